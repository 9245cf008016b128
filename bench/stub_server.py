"""An OpenAI-style server without a model, fast enough to measure clients: `python -m bench.stub_server --step S`.

Streams as an engine does: every S seconds each open stream gets one token, in a chunk of its own. Prints its port.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time

import httptools
import uvloop

MODEL = "stub"
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def _chunk(event: dict[str, object] | str) -> bytes:
    data = b"data: " + (event if isinstance(event, str) else json.dumps(event)).encode() + b"\n\n"
    return b"%x\r\n%s\r\n" % (len(data), data)


def _token(reason: str | None) -> bytes:
    choice = {"index": 0, "text": " word", "logprobs": None, "finish_reason": reason, "stop_reason": None}
    event = {"id": "cmpl-0123456789abcdef0123456789abcdef", "object": "text_completion", "created": 1_700_000_000}
    return _chunk({**event, "model": MODEL, "choices": [choice], "usage": None})


TOKEN, LAST = _token(None), _token("length")


class Stub(asyncio.Protocol):
    """One connection: requests one after the other, each a stream of its own."""

    def __init__(self, streams: set[Stub]) -> None:
        self._streams = streams
        self._transport: asyncio.WriteTransport | None = None
        self._parser = httptools.HttpRequestParser(self)
        self._path, self._body = b"", bytearray()
        self._prompt = self._tokens = self._left = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def connection_lost(self, error: Exception | None) -> None:
        self._streams.discard(self)

    def on_url(self, url: bytes) -> None:
        self._path = url

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        assert self._transport is not None
        body, self._body = bytes(self._body), bytearray()
        if self._path.endswith(b"/completions"):
            asked = json.loads(body)
            self._tokens = self._left = asked["max_tokens"]
            self._prompt = len(asked["prompt"])
            self._transport.write(HEAD)
            self._streams.add(self)
        else:
            answer = json.dumps({"object": "list", "data": [{"id": MODEL, "parent": None}]}).encode()
            self._transport.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(answer), answer))

    def step(self) -> None:
        """Sends the next token; ends a stream that has all its tokens."""
        assert self._transport is not None
        self._left -= 1
        if self._left:
            self._transport.write(TOKEN)
            return
        self._streams.discard(self)
        usage = {"prompt_tokens": self._prompt, "completion_tokens": self._tokens}
        end = _chunk({"choices": [], "usage": usage}) + _chunk("[DONE]")
        self._transport.write(LAST + end + b"0\r\n\r\n")


async def _serve(step: float) -> None:
    streams: set[Stub] = set()
    server = await asyncio.get_running_loop().create_server(lambda: Stub(streams), "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    due = time.perf_counter()
    while True:
        due = max(due + step, time.perf_counter())
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        for stream in tuple(streams):
            stream.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--step", type=float, default=0.0, help="seconds between tokens of a stream (default: 0)")
    uvloop.run(_serve(parser.parse_args().step))


if __name__ == "__main__":
    main()
