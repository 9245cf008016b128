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

    def __init__(self, url: str, *, timeout: float = 600.0) -> None:
        """Raises InvalidArgument if `url` isn't a plain HTTP address."""
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
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
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
        self._status = 0  # 0: the head isn't complete
        self._refusal = bytearray()
        self._rest = b""  # bytes of an incomplete head or chunk
        self._chunked = False
        self._left: int | None = None  # remaining body bytes, if the head gives a length

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        self._transport = transport
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        if self.done.done():
            return
        try:
            if self._status == 0:
                data = self._read_head(self._rest + data)
            if self._status:
                self._read_body(data)
        except RequestFailed as error:
            self._end(error)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            self._end(RequestFailed(f"the answer is not what an OpenAI-style server sends: {error!r}"))

    def connection_lost(self, error: Exception | None) -> None:
        until_close = bool(self._status) and not self._chunked and self._left is None
        if error is None and until_close:
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

    def _read_head(self, data: bytes) -> bytes:
        """Removes a complete head; returns the bytes behind it."""
        head, found, body = data.partition(b"\r\n\r\n")
        if not found:
            if len(data) > MAX_HEAD_BYTES:
                raise RequestFailed("the head of the answer has no end")
            self._rest = data
            return b""
        lines = head.decode("latin-1").split("\r\n")
        if not lines[0].startswith("HTTP/1."):
            raise RequestFailed(f"not an HTTP/1.1 server: {lines[0][:80]!r}")
        headers = {
            name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])
        }
        self._chunked = headers.get("transfer-encoding", "").lower() == "chunked"
        if not self._chunked and "content-length" in headers:
            self._left = int(headers["content-length"])
        self._status = int(lines[0].split(" ")[1])
        self._rest = b""
        return body

    def _read_body(self, data: bytes) -> None:
        sink = self._on_body if self._status == 200 else self._refusal.extend
        if not self._chunked:
            sink(data)
            if self._left is not None:
                self._left -= len(data)
                if self._left <= 0:
                    self._end(None)
            return
        data = self._rest + data
        position = 0
        while (line := data.find(b"\r\n", position)) >= 0:
            size = int(data[position:line].partition(b";")[0], 16)
            start, end = line + 2, line + 2 + size
            if end + 2 > len(data):
                break
            if size == 0:
                self._end(None)
                return
            sink(data[start:end])
            position = end + 2
        self._rest = data[position:]

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
