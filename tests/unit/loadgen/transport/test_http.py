"""The streaming client against a scripted server: what is a token, what is an error, and that nothing is left open."""

from __future__ import annotations

import asyncio
import ssl
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preft_loadgen.errors import InvalidArgument, RequestFailed
from preft_loadgen.transport.connection import Exchange
from preft_loadgen.transport.http import HttpClient
from support.certificates import write_certificate
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
    assert reply.started + 0.02 <= reply.arrivals[0]
    assert reply.started + 0.06 <= reply.arrivals[-1] <= reply.ended
    assert list(reply.arrivals) == sorted(reply.arrivals)
    assert calls[0].body == {**BODY, "stream": True, "stream_options": {"include_usage": True}}
    assert (calls[0].method, calls[0].path) == ("POST", "/v1/completions")


async def test_the_servers_count_wins_over_the_number_of_events() -> None:
    reply = await ask(sends(HEAD, chunk(event("ab")), chunk(event("", "stop") + usage(5) + DONE), b"0\r\n\r\n"))
    assert (reply.tokens, len(reply.arrivals), reply.finish_reason) == (5, 1, "stop")


async def test_a_body_that_ends_with_the_connection() -> None:
    reply = await ask(sends(b"HTTP/1.1 200 OK\r\n\r\n", event("a", "stop") + usage(1), DONE))
    assert reply.text == "a"


@pytest.mark.parametrize(
    ("script", "message", "kind"),
    [
        (
            sends(json_reply("429 Too Many Requests", {"error": {"message": "queue is full"}})),
            "429: queue is full",
            "http 429",
        ),
        (sends(json_reply("500 Oops", ["no such shape"])), "the server answered 500", "http 500"),
        (sends(b"HTTP/1.1 302 Found\r\nlocation: /x\r\ncontent-length: 0\r\n\r\n"), "answered 302", "http 302"),
        (sends(HEAD, chunk(event("a", "stop")), b"0\r\n\r\n"), "ended before", "broken stream"),
        (sends(HEAD, chunk(event("a", "stop"))), "connection broke", "broken stream"),
        (sends(HEAD[:20]), "connection broke", "connection"),
        (sends(), "connection broke", "connection"),
        (sends(HEAD, b"xyz\r\n"), "not what an OpenAI-style server sends", "malformed"),
        (sends(b"SSH-2.0-OpenSSH\r\n\r\n"), "not what an OpenAI-style server sends", "malformed"),
        (sends(b"HTTP/1.1 200 OK\r\n" + b"x" * 70_000), "has no end", "malformed"),
        (
            sends(b"HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\n"),
            "not what an OpenAI-style server sends",
            "malformed",
        ),
    ],
)
async def test_what_is_not_a_whole_answer_is_an_error(script, message: str, kind: str) -> None:
    with pytest.raises(RequestFailed, match=message) as failed:
        await ask(script)
    assert failed.value.kind == kind
    assert failed.value.status == (int(kind[5:]) if kind.startswith("http") else None)


async def test_an_interim_answer_is_passed_over() -> None:
    whole = event("a", "stop") + usage(1) + DONE
    reply = await ask(sends(b"HTTP/1.1 100 Continue\r\n\r\n", HEAD, chunk(whole), b"0\r\n\r\n"))
    assert reply.text == "a"


async def test_a_refusal_without_end_costs_no_memory() -> None:
    async def endless(call: Call) -> None:
        await call.write(b"HTTP/1.1 500 Oops\r\ntransfer-encoding: chunked\r\n\r\n")
        while not call.disconnected.is_set():
            await call.write(chunk(b"x" * 100_000))
            await asyncio.sleep(0)

    with pytest.raises(RequestFailed, match="within"):
        await ask(endless, timeout=0.3)


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


@pytest.mark.parametrize(
    "url",
    ["ftp://h:1", "127.0.0.1:8000", "http://", "http://h:port", "http://h:99999", "http://me:key@h", "http://h/?a=b"],
)
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(InvalidArgument, match="http://host:port"):
        HttpClient(url)


@settings(deadline=None)
@given(st.lists(st.binary(min_size=1, max_size=40), max_size=6), st.lists(st.integers(1, 300)))
def test_a_body_is_the_same_however_its_bytes_are_grouped(pieces: list[bytes], cuts: list[int]) -> None:
    wire = HEAD + b"".join(map(chunk, pieces)) + b"0\r\n\r\n"
    loop = asyncio.new_event_loop()
    try:
        body = bytearray()
        exchange = Exchange(body.extend, loop.create_future())
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
        exchange = Exchange(lambda data: None, asyncio.get_running_loop().create_future())
        exchange.data_received(refused[:cut])
        exchange.data_received(refused[cut:])
        with pytest.raises(RequestFailed, match="400: no"):
            await exchange.done


@pytest.mark.parametrize("path", ["", "/v1", "/v1/", "/under/v1"])
async def test_addresses_with_a_path(path: str) -> None:
    calls: list[Call] = []
    async with fake_server(tokens, calls) as url:
        await HttpClient(url + path).stream("/v1/completions", BODY)
    assert calls[0].path == path.removesuffix("/").removesuffix("/v1") + "/v1/completions"


async def test_a_time_limit_that_is_none() -> None:
    for limit in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(InvalidArgument, match="more than 0 seconds"):
            HttpClient("http://h", timeout=limit)


class KeptServer:
    """Answers every request on a connection; counts connections. After `closes_after` answers it closes in silence."""

    def __init__(self, closes_after: int | None = None) -> None:
        self.connections = self.answers = 0
        self._closes_after = closes_after

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                assert "Connection: keep-alive" in head
                length = next(int(line[15:]) for line in head.split("\r\n") if line.startswith("Content-Length:"))
                await reader.readexactly(length)
                if self.answers == self._closes_after:
                    self._closes_after = None
                    return
                self.answers += 1
                writer.write(HEAD + chunk(event("a", "stop") + usage(1) + DONE) + b"0\r\n\r\n")
        except asyncio.IncompleteReadError:
            return
        finally:
            writer.close()

    async def ask(self, count: int) -> None:
        server = await asyncio.start_server(self.handle, "127.0.0.1", 0)
        async with server, HttpClient(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}") as client:
            for _ in range(count):
                assert (await client.stream("/v1/completions", BODY)).text == "a"


async def test_connections_are_kept() -> None:
    server = KeptServer()
    await server.ask(5)
    assert (server.connections, server.answers) == (1, 5)


async def test_a_kept_connection_that_the_server_closes_is_no_failure() -> None:
    server = KeptServer(closes_after=2)
    await server.ask(5)
    assert (server.connections, server.answers) == (2, 5)


async def test_cancelled_answers_close_their_connection() -> None:
    calls: list[Call] = []

    async def slow(call: Call) -> None:
        await call.write(HEAD + chunk(event("a")))
        await call.write(chunk(event("b")))
        await call.disconnected.wait()

    async with fake_server(slow, calls) as url, HttpClient(url) as client:
        reply = await client.stream("/v1/completions", BODY, cancel_after=2)
        assert (reply.finish_reason, reply.tokens) == ("cancelled", 2)
        await asyncio.wait_for(calls[0].disconnected.wait(), 2)


async def test_https(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server's certificate is checked with the system's authorities, or those of SSL_CERT_FILE."""
    certificate, key = write_certificate(tmp_path)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)
    server = await asyncio.start_server(KeptServer().handle, "127.0.0.1", 0, ssl=context)
    async with server:
        url = f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with HttpClient(url) as client:
            with pytest.raises(RequestFailed, match="can't reach"):
                await client.stream("/v1/completions", BODY)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        async with HttpClient(url) as client:
            assert (await client.stream("/v1/completions", BODY)).text == "a"
