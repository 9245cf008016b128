"""Events of a stream: what counts as output, what is an error, and that nothing a server sends can do harm."""

from __future__ import annotations

import json
import time
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preft_loadgen.errors import RequestFailed
from preft_loadgen.transport.events import MAX_EVENT_BYTES, Events, HangUp
from preft_loadgen.transport.reply import Reply
from unit.loadgen.sse_server import DONE, event, usage

WHOLE = event("a") + event("bc", "length") + usage(2) + DONE


def read(*pieces: bytes) -> Reply:
    events = Events()
    for piece in pieces:
        events.feed(piece)
    return events.reply(0.0)


def data(body: Any) -> bytes:
    return b"data: " + json.dumps(body).encode() + b"\n\n"


def test_a_whole_answer() -> None:
    reply = read(WHOLE)
    assert (reply.text, reply.tokens, reply.finish_reason, reply.sizes) == ("abc", 2, "length", (1, 2))
    assert len(reply.arrivals) == 2


def test_token_ids_are_kept_and_count() -> None:
    reply = read(event("ab", None, **{}), WHOLE)
    assert reply.token_ids == ()
    choice = {"index": 0, "text": "x", "finish_reason": None, "token_ids": [5, 6]}
    last = {"index": 0, "text": "", "finish_reason": "stop", "token_ids": [7]}
    reply = read(data({"choices": [choice]}) + data({"choices": [last]}) + DONE)
    assert (reply.token_ids, reply.sizes, reply.tokens, len(reply.arrivals)) == ((5, 6, 7), (2, 1), 3, 2)


def test_prompt_tokens_and_reasoning() -> None:
    delta = {"index": 0, "delta": {"reasoning_content": "hm"}, "finish_reason": None}
    end = {"index": 0, "delta": {"content": "so"}, "finish_reason": "stop"}
    counts = {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 2}}
    reply = read(data({"choices": [delta]}), data({"choices": [end]}), data(counts), DONE)
    assert (reply.text, reply.prompt_tokens, reply.tokens) == ("hmso", 9, 2)


@settings(deadline=None)
@given(st.lists(st.integers(1, 60)))
def test_an_answer_is_the_same_however_its_bytes_are_cut(cuts: list[int]) -> None:
    wire = b": a comment\r\n\r\n" + WHOLE.replace(b"\n", b"\r\n")
    places = [0, *sorted(set(cuts)), len(wire)]
    reply = read(*(wire[begin:end] for begin, end in pairwise(places)))
    assert (reply.text, reply.tokens) == ("abc", 2)


@pytest.mark.parametrize(
    ("pieces", "kind"),
    [
        ((event("a") + DONE,), "broken stream"),
        ((event("a", "stop"),), "broken stream"),
        ((), "broken stream"),
        ((event("a", "stop") + DONE,), "no usage"),
        ((event("a", "stop") + usage(0) + DONE,), "malformed"),
        ((event("a") + data({"error": {"message": "lost it"}}),), "error in stream"),
        ((event("a") + data({"error": "lost it"}),), "error in stream"),
        ((event("a") + data({"error": {"code": 5}}),), "error in stream"),
        ((WHOLE + event("more"),), "malformed"),
        ((data({}),), "malformed"),
        ((data([]),), "malformed"),
        ((data({"choices": None}),), "malformed"),
        ((data({"choices": [{"text": 5}]}),), "malformed"),
        ((data({"choices": [{"text": "a", "index": 1}]}),), "malformed"),
        ((data({"choices": [{"delta": [1]}]}),), "malformed"),
        ((data({"choices": [{"text": "a", "token_ids": [-1]}]}),), "malformed"),
        ((data({"choices": [], "usage": {"completion_tokens": -3}}),), "malformed"),
        ((data({"choices": [], "usage": {"completion_tokens": 1e300}}),), "malformed"),
        ((data({"choices": [], "usage": {"completion_tokens": True}}),), "malformed"),
        ((data({"choices": [], "usage": {"completion_tokens": "many"}}),), "malformed"),
        ((data({"choices": [], "usage": [1]}),), "malformed"),
        ((b"data: {\n",), "malformed"),
        ((b"data: \xff\xfe\n",), "malformed"),
        ((b"data: " + b"[" * 100_000 + b"\n",), "malformed"),
        ((b"data: " + b"9" * 10_000 + b"\n",), "malformed"),
        ((b"x" * (MAX_EVENT_BYTES + 1),), "malformed"),
        ((b"<html>no</html>\n",), "broken stream"),
    ],
)
def test_what_is_no_answer_is_an_error(pieces: tuple[bytes, ...], kind: str) -> None:
    with pytest.raises(RequestFailed) as failed:
        read(*pieces)
    assert failed.value.kind == kind
    assert len(str(failed.value)) < 1000


@settings(deadline=None)
@given(st.binary(max_size=200), st.integers(0, len(WHOLE)))
def test_any_bytes_end_in_an_answer_or_an_error(noise: bytes, place: int) -> None:
    try:
        reply = read(WHOLE[:place] + noise + WHOLE[place:])
    except RequestFailed:
        return
    assert reply.tokens == 2


values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=5) | st.integers(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["text", "delta", "usage"]), inner),
)


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(["choices", "usage", "error"]), values))
def test_any_json_ends_in_an_answer_or_an_error(body: Any) -> None:
    try:
        reply = read(data(body) + WHOLE)
    except RequestFailed:
        return
    assert reply.tokens == 2


def test_the_client_hangs_up_as_planned() -> None:
    events = Events(cancel_after=2)
    events.feed(event("a"))
    with pytest.raises(HangUp):
        events.feed(event("b"))
    reply = events.reply(0.0, hung_up=True)
    assert (reply.finish_reason, reply.tokens, reply.text) == ("cancelled", 2, "ab")


def test_events_are_cheap() -> None:
    """Less than 50 us of CPU time per token, which is the bar of 20,000 tokens per second and core."""
    pieces = [event(" word", id="cmpl-0123456789abcdef", object="text_completion", created=1, model="m")] * 2000
    best = float("inf")
    for _ in range(3):
        events = Events()
        started = time.process_time()
        for piece in pieces:
            events.feed(piece)
        best = min(best, time.process_time() - started)
    assert best / len(pieces) < 50e-6
