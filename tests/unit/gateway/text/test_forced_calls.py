"""Forced calls are read alike however the output is cut into pieces."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preft.gateway.text.choice import ToolCallDelta
from preft.gateway.text.choice_reader import joined_calls
from preft.gateway.text.forced_calls import CallArray, ForcedCalls, NamedCall

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def new_id(name: str, position: int) -> str:
    return f"{name}-{position}"


def read(calls: ForcedCalls, pieces: Iterable[str]) -> tuple[str, tuple[ToolCallDelta, ...]]:
    """Content and joined calls. Each call's id and name come once, with the call's first part."""
    content, deltas = "", []
    *first, last = [*pieces]
    for piece, finished in [*((piece, False) for piece in first), (last, True)]:
        parts = calls.push(piece, finished=finished)
        content += parts.content
        deltas += parts.tool_calls
    begun: set[int] = set()
    for delta in deltas:
        assert bool(delta.id) == bool(delta.name) == (delta.position not in begun)
        begun.add(delta.position)
    return content, joined_calls(deltas)


def cuts(text: str) -> Iterator[list[str]]:
    """The text whole, in two pieces at every place, and in single characters."""
    yield [text]
    yield [*text]
    for place in range(1, len(text)):
        yield [text[:place], text[place:]]


CALLS = [("look", {"at": 'a "quoted\\" } ] thing', "deep": [{"x": []}, {}]}), ("add", {})]


@pytest.mark.parametrize("indent", [None, 1])
def test_an_array_of_calls_cut_anywhere(indent):
    text = json.dumps([{"name": name, "parameters": arguments} for name, arguments in CALLS], indent=indent)
    for pieces in cuts(text):
        content, calls = read(CallArray(new_id), pieces)
        assert content == ""
        assert [(call.position, call.id, call.name) for call in calls] == [(0, "look-0", "look"), (1, "add-1", "add")]
        assert [json.loads(call.arguments) for call in calls] == [arguments for _, arguments in CALLS]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.text(min_size=1), JSON), min_size=1, max_size=4), st.data())
def test_any_calls_in_any_pieces(wanted, data):
    text = json.dumps([{"name": name, "parameters": arguments} for name, arguments in wanted], ensure_ascii=False)
    places = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
    pieces = [text[start:end] for start, end in zip([0, *places], [*places, len(text)], strict=True)]
    content, calls = read(CallArray(new_id), pieces)
    assert content == ""
    assert [(call.name, json.loads(call.arguments)) for call in calls] == wanted


def test_a_call_that_max_tokens_cuts_off_keeps_its_arguments():
    text = '[{"name": "look", "parameters": {"at": "the sk'
    assert read(CallArray(new_id), [*text]) == ("", (ToolCallDelta(0, '{"at": "the sk', "look-0", "look"),))


@pytest.mark.parametrize("text", ['[{"name": "lo', "I'd rather talk.", "  [", '[1, 2, {"name": 3}]', '{"name": "a"}'])
def test_what_is_no_call_is_content(text):
    for pieces in cuts(text):
        assert read(CallArray(new_id), pieces) == (text, ())


def test_words_that_are_no_calls_are_content_at_once():
    assert CallArray(new_id).push("I'd", finished=False).content == "I'd"


def test_arguments_of_a_named_call_in_any_pieces():
    for pieces in cuts('{"at": "sky"}'):
        expected = (ToolCallDelta(0, '{"at": "sky"}', "look-0", "look"),)
        assert read(NamedCall("look", new_id), ["", *pieces, ""]) == ("", expected)
    assert read(NamedCall("look", new_id), [""]) == ("", ())
