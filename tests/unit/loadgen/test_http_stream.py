"""The streaming client against a scripted server: what is a token, what is an error, and that nothing is left open."""

from __future__ import annotations

import asyncio
import json
import time
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preft_loadgen.errors import InvalidArgument
from preft_loadgen.http_stream import HttpClient, RequestFailed, _Exchange
from unit.loadgen.sse_server import DONE, HEAD, Call, chunk, event, fake_server, json_reply, tokens, usage

BODY = {"model": "m", "prompt": [1, 2], "max_tokens": 3}


def sends(*pieces: bytes):
    async def script(call: Call) -> None:
        for piece in pieces:
            await call.write(piece)

    return script


async def ask(script, **options) -> object:
    async with fake_server(script) as url:
        return await HttpClient(url, **options).stream("/v1/completions", BODY)


async def test_tokens_text_and_times() -> None:
    calls: list[Call] = []
    async with fake_server(lambda call: tokens(call, 0.02), calls) as url:
        reply = await HttpClient(url).stream("/v1/completions", BODY)
    assert (reply.text, reply.tokens, reply.finish_reason) == (" t t t", 3, "length")
    assert len(reply.arrivals) == 3
    gaps = [later - earlier for earlier, later in pairwise((reply.started, *reply.arrivals))]
    assert all(gap >= 0.015 for gap in gaps)
    assert reply.arrivals[-1] <= reply.ended
    assert calls[0].body == {**BODY, "stream": True, "stream_options": {"include_usage": True}}
    assert (calls[0].method, calls[0].path) == ("POST", "/v1/completions")


async def test_the_servers_count_wins_over_the_number_of_events() -> None:
    reply = await ask(sends(HEAD, chunk(event("ab")), chunk(event("", "stop") + usage(5) + DONE), b"0\r\n\r\n"))
    assert (reply.tokens, len(reply.arrivals), reply.finish_reason) == (5, 1, "stop")


async def test_events_count_where_the_server_sends_no_usage() -> None:
    reply = await ask(sends(HEAD, chunk(event("a")), chunk(event("b", "stop") + DONE), b"0\r\n\r\n"))
    assert reply.tokens == 2


async def test_chat_deltas() -> None:
    opening = b'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}]}\n\n'
    said = b'data: {"choices":[{"index":0,"delta":{"content":"hi"},"finish_reason":null}]}\n\n'
    end = b'data: {"choices":[{"index":0,"delta":{"content":""},"finish_reason":"stop"}]}\n\n'
    reply = await ask(sends(HEAD, chunk(opening + said), chunk(end + DONE), b"0\r\n\r\n"))
    assert (reply.text, reply.tokens, reply.finish_reason) == ("hi", 1, "stop")


async def test_a_body_that_ends_with_the_connection() -> None:
    reply = await ask(sends(b"HTTP/1.1 200 OK\r\n\r\n", event("a", "stop"), DONE))
    assert reply.text == "a"


@pytest.mark.parametrize(
    ("script", "message", "status"),
    [
        (
            sends(json_reply("429 Too Many Requests", {"error": {"message": "queue is full"}})),
            "429: queue is full",
            429,
        ),
        (sends(json_reply("500 Oops", ["no such shape"])), "the server answered 500", 500),
        (sends(HEAD, chunk(event("a")), chunk(b'data: {"error":{"message":"lost it"}}\n\n' + DONE)), "lost it", None),
        (sends(HEAD, chunk(event("a", "stop")), b"0\r\n\r\n"), "ended before", None),
        (sends(HEAD, chunk(event("a") + DONE), b"0\r\n\r\n"), "ended before", None),
        (sends(HEAD, chunk(event("a", "stop"))), "connection broke", None),
        (sends(HEAD[:20]), "connection broke", None),
        (sends(), "connection broke", None),
        (sends(HEAD, b"xyz\r\n"), "not what an OpenAI-style server sends", None),
        (sends(HEAD, chunk(b"data: {}\n\n")), "not what an OpenAI-style server sends", None),
        (sends(b"SSH-2.0-OpenSSH\r\n\r\n"), "not what an OpenAI-style server sends", None),
        (sends(b"HTTP/1.1 200 OK\r\n" + b"x" * 70_000), "has no end", None),
    ],
)
async def test_what_is_not_a_whole_answer_is_an_error(script, message: str, status: int | None) -> None:
    with pytest.raises(RequestFailed, match=message) as failed:
        await ask(script)
    assert failed.value.status == status


async def test_a_reset_connection() -> None:
    async def reset(call: Call) -> None:
        await call.write(HEAD)
        call.writer.transport.abort()

    with pytest.raises(RequestFailed, match="connection broke"):
        await ask(reset)


async def test_nobody_listens() -> None:
    with pytest.raises(RequestFailed, match=r"can't reach 127\.0\.0\.1:9"):
        await HttpClient("http://127.0.0.1:9").stream("/v1/completions", BODY)


async def test_a_silent_server_costs_no_more_than_the_time_limit() -> None:
    started = time.perf_counter()
    with pytest.raises(RequestFailed, match=r"within 0\.1 s"):
        await ask(lambda call: call.disconnected.wait(), timeout=0.1)
    assert time.perf_counter() - started < 2


async def test_a_cancelled_request_closes_its_connection() -> None:
    calls: list[Call] = []

    async def slow(call: Call) -> None:
        await call.write(HEAD + chunk(event("a")))
        await call.disconnected.wait()

    async with fake_server(slow, calls) as url:
        task = asyncio.create_task(HttpClient(url).stream("/v1/completions", BODY))
        while not calls:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.wait_for(calls[0].disconnected.wait(), 2)


async def test_json() -> None:
    async with fake_server(sends(json_reply("200 OK", {"data": [1]}))) as url:
        assert await HttpClient(url).get_json("/v1/models") == {"data": [1]}
    async with fake_server(sends(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nno")) as url:
        with pytest.raises(RequestFailed, match="didn't answer with JSON"):
            await HttpClient(url).get_json("/v1/models")


@pytest.mark.parametrize("url", ["https://127.0.0.1:1", "127.0.0.1:8000", "http://", "http://h:port", "http://h:99999"])
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(InvalidArgument, match="http://host:port"):
        HttpClient(url)


@given(st.lists(st.binary(min_size=1, max_size=40), max_size=6), st.lists(st.integers(1, 300)))
def test_a_body_is_the_same_however_its_bytes_are_grouped(pieces: list[bytes], cuts: list[int]) -> None:
    wire = HEAD + b"".join(map(chunk, pieces)) + b"0\r\n\r\n"
    loop = asyncio.new_event_loop()
    try:
        body = bytearray()
        exchange = _Exchange(b"", body.extend, loop.create_future())
        start = 0
        for end in [*sorted(cut for cut in cuts if cut < len(wire)), len(wire)]:
            if end > start:
                exchange.data_received(wire[start:end])
            start = end
        assert exchange.done.done()
        assert exchange.done.exception() is None
        assert bytes(body) == b"".join(pieces)
    finally:
        loop.close()


async def test_an_error_text_survives_being_cut_anywhere() -> None:
    refused = json_reply("400 Bad Request", {"error": {"message": "no"}})
    for cut in range(1, len(refused)):
        exchange = _Exchange(b"", lambda data: None, asyncio.get_running_loop().create_future())
        exchange.data_received(refused[:cut])
        exchange.data_received(refused[cut:])
        with pytest.raises(RequestFailed, match="400: no"):
            await exchange.done


def test_the_client_is_cheap() -> None:
    """Less than 50 us per token of its own, ten times below what any server needs here."""
    from preft_loadgen.http_stream import _Events

    pieces = [event(" word", id="cmpl-0123456789abcdef", object="text_completion", created=1, model="m")] * 2000
    best = float("inf")
    for _ in range(3):
        events = _Events()
        started = time.process_time()
        for piece in pieces:
            events.feed(piece)
        best = min(best, time.process_time() - started)
    assert best / len(pieces) < 50e-6
    assert json.loads(pieces[0][5:])["choices"][0]["text"] == " word"
