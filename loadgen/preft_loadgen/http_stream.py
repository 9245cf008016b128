"""A lean HTTP/1.1 client for streamed completions: one connection per request, decoded as bytes arrive.

Owns the way from bytes to text pieces with arrival times. Cheap per token, because a client that is slower than the
server measures itself. Plain HTTP only. The driver chooses the requests and their times.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httptools

from preft_loadgen.errors import InvalidArgument, LoadgenError

MAX_HEAD_BYTES = 64 << 10


class RequestFailed(LoadgenError):
    """There is no complete answer. `status` is HTTP's if the server refused, None if the connection or stream broke."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True)
class Reply:
    """One complete streamed answer. Times are `time.perf_counter()` seconds.

    `arrivals` has one entry per piece of text. A piece is one token, unless the server joined tokens or held back a
    part of a character. `tokens` is the server's own count.
    """

    started: float
    ended: float
    arrivals: tuple[float, ...]
    tokens: int
    text: str
    finish_reason: str


class HttpClient:
    """Sends requests to one server. `timeout` in seconds bounds each request as a whole."""

    def __init__(self, url: str, *, timeout: float = 600.0, api_key: str = "") -> None:
        """`api_key` has visible ASCII characters; "": the server needs none.

        Raises InvalidArgument if `url` isn't a plain HTTP address.
        """
        parts = urlsplit(url)
        try:
            port = parts.port
        except ValueError:
            port = -1
        if parts.scheme != "http" or not parts.hostname or port == -1:
            raise InvalidArgument(f"the server's address must look like http://host:port, not {url!r}")
        self._host, self._port = parts.hostname, port or 80
        self._base = parts.path.rstrip("/")
        self._timeout = timeout
        self._key = f"Authorization: Bearer {api_key}\r\n" if api_key else ""

    async def get_json(self, path: str) -> Any:
        """Returns the decoded JSON answer. Raises RequestFailed."""
        return await self._json("GET", path, b"")

    async def post_json(self, path: str, body: dict[str, Any]) -> Any:
        """Raises RequestFailed."""
        return await self._json("POST", path, json.dumps(body).encode())

    async def patch_json(self, path: str, body: dict[str, Any]) -> Any:
        """Raises RequestFailed."""
        return await self._json("PATCH", path, json.dumps(body).encode())

    async def stream(self, path: str, body: dict[str, Any]) -> Reply:
        """Posts a completion or chat completion and reads its one choice to the end.

        Raises RequestFailed if the server refuses, disconnects early or sends an error in the stream.
        """
        asked = {**body, "stream": True, "stream_options": {"include_usage": True}}
        events = _Events()
        started = time.perf_counter()
        await self._exchange("POST", path, json.dumps(asked).encode(), events.feed)
        return events.reply(started)

    async def _json(self, method: str, path: str, body: bytes) -> Any:
        answer = bytearray()
        await self._exchange(method, path, body, answer.extend)
        try:
            return json.loads(answer)
        except ValueError as error:
            raise RequestFailed(f"{path} didn't answer with JSON") from error

    async def _exchange(self, method: str, path: str, body: bytes, on_body: Callable[[bytes], object]) -> None:
        head = (
            f"{method} {self._base}{path} HTTP/1.1\r\nHost: {self._host}:{self._port}\r\nConnection: close\r\n"
            f"{self._key}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        loop = asyncio.get_running_loop()
        exchange = _Exchange(head.encode() + body, on_body, loop.create_future())
        try:
            async with asyncio.timeout(self._timeout):
                await loop.create_connection(lambda: exchange, self._host, self._port)
                await exchange.done
        except TimeoutError:
            raise RequestFailed(f"no whole answer within {self._timeout:g} s") from None
        except OSError as error:
            raise RequestFailed(f"can't reach {self._host}:{self._port}: {error.strerror or error}") from error
        finally:
            exchange.abort()


class _Exchange(asyncio.Protocol):
    """One request and the bytes of its response. `done` ends with the response or a RequestFailed."""

    def __init__(self, request: bytes, on_body: Callable[[bytes], object], done: asyncio.Future[None]) -> None:
        self.done = done
        self._request = request
        self._on_body = on_body
        self._transport: asyncio.WriteTransport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._head_bytes = 0
        self._status = 0  # 0: the head isn't complete
        self._refusal = bytearray()
        self._says_its_end = False  # else the end of the connection is the end of the body

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        self._transport = transport
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        if self.done.done():
            return
        self._head_bytes += 0 if self._status else len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            cause = error.__context__ if isinstance(error, httptools.HttpParserCallbackError) else error
            if not isinstance(cause, RequestFailed):
                cause = RequestFailed(f"the answer is not what an OpenAI-style server sends: {cause!r}")
            self._end(cause)
        if not self._status and self._head_bytes > MAX_HEAD_BYTES:
            self._end(RequestFailed("the head of the answer has no end"))

    def connection_lost(self, error: Exception | None) -> None:
        if error is None and self._status and not self._says_its_end:
            self._end(None)
        else:
            self._end(
                RequestFailed(f"the connection broke before the answer was whole{f' ({error})' if error else ''}")
            )

    def abort(self) -> None:
        """Closes the connection at once."""
        if self._transport is not None:
            self._transport.abort()
        if not self.done.cancel() and not self.done.cancelled():
            self.done.exception()  # reads the error, which no caller may want any more

    # Called by the parser

    def on_header(self, name: bytes, value: bytes) -> None:
        self._says_its_end |= name.lower() in (b"content-length", b"transfer-encoding")

    def on_headers_complete(self) -> None:
        self._status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        (self._on_body if self._status == 200 else self._refusal.extend)(body)

    def on_message_complete(self) -> None:
        self._end(None)

    def _end(self, error: RequestFailed | None) -> None:
        if self.done.done():
            return
        if error is None and self._status != 200:
            error = RequestFailed(_sentence(self._status, bytes(self._refusal)), self._status)
        if error is None:
            self.done.set_result(None)
        else:
            self.done.set_exception(error)


class _Events:
    """Server-sent events of a completion's stream, with arrival times."""

    def __init__(self) -> None:
        self._rest = b""
        self._arrivals: list[float] = []
        self._texts: list[str] = []
        self._tokens: int | None = None
        self._finish_reason: str | None = None
        self._ended: float | None = None

    def feed(self, data: bytes) -> None:
        """Reads all complete events. Raises RequestFailed for an error event."""
        now = time.perf_counter()
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                self._event(line[5:].strip(), now)

    def reply(self, started: float) -> Reply:
        """The whole answer. Raises RequestFailed if the stream ended too early."""
        if self._ended is None or self._finish_reason is None:
            raise RequestFailed("the stream ended before its answer was whole")
        tokens = len(self._arrivals) if self._tokens is None else self._tokens
        return Reply(started, self._ended, tuple(self._arrivals), tokens, "".join(self._texts), self._finish_reason)

    def _event(self, payload: bytes, now: float) -> None:
        if payload == b"[DONE]":
            self._ended = now
            return
        event = json.loads(payload)
        if error := event.get("error"):
            raise RequestFailed(str(error.get("message", error)))
        for choice in event["choices"]:
            text = choice["delta"].get("content") if "delta" in choice else choice["text"]
            if text:
                self._arrivals.append(now)
                self._texts.append(text)
            self._finish_reason = choice.get("finish_reason") or self._finish_reason
        if usage := event.get("usage"):
            self._tokens = usage["completion_tokens"]


def _sentence(status: int, body: bytes) -> str:
    """The refusing server's message: from an OpenAI-style error body, else the status."""
    try:
        return f"{status}: {json.loads(body)['error']['message']}"
    except (ValueError, KeyError, TypeError):
        return f"the server answered {status}"
