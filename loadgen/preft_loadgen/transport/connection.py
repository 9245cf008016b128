"""One HTTP/1.1 exchange over one connection, decoded as bytes arrive. Knows no endpoints and no events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import cast

import httptools

from preft_loadgen.errors import LoadgenError, RequestFailed
from preft_loadgen.transport.events import HangUp

MAX_HEAD_BYTES = 64 << 10
MAX_REFUSAL_BYTES = 1 << 20


class Stale(LoadgenError):
    """The server closed a kept connection before it answered: the request may be sent again."""


class Connection(asyncio.Protocol):
    """Carries one exchange after the other. `usable` while the next one may be sent."""

    def __init__(self) -> None:
        self.usable = False
        self._transport: asyncio.WriteTransport | None = None
        self._exchange: Exchange | None = None
        self._exchanges = 0

    async def send(self, request: bytes, on_body: Callable[[bytes], object]) -> None:
        """Returns with the end of the answer, whose body goes to `on_body` in pieces.

        Raises RequestFailed, and what `on_body` raises. The caller closes a connection that isn't usable afterwards.
        """
        assert self._transport is not None
        self.usable = False
        self._exchanges += 1
        self._exchange = Exchange(on_body, asyncio.get_running_loop().create_future(), first=self._exchanges == 1)
        self._transport.write(request)
        try:
            await self._exchange.done
            self.usable = self._exchange.keeps_open and not self._transport.is_closing()
        finally:
            self._exchange.abandon()

    def close(self) -> None:
        """Closes the connection at once."""
        self.usable = False
        if self._transport is not None:
            self._transport.abort()

    # Called by asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.WriteTransport", transport)  # uvloop's is no subclass

    def data_received(self, data: bytes) -> None:
        if self._exchange is None or self._exchange.done.done():
            self.usable = False  # nobody asked for this
            return
        self._exchange.data_received(data)

    def connection_lost(self, error: Exception | None) -> None:
        self.usable = False
        if self._exchange is not None:
            self._exchange.connection_lost(error)


class Exchange:
    """The bytes of one response. `done` ends with the response or an error."""

    def __init__(self, on_body: Callable[[bytes], object], done: asyncio.Future[None], *, first: bool = True) -> None:
        self.done = done
        self.keeps_open = False
        self._on_body = on_body
        self._first = first
        self._parser = httptools.HttpResponseParser(self)
        self._head_bytes = 0
        self._status = 0  # 0: the head isn't complete
        self._refusal = bytearray()
        self._says_its_end = False  # else the end of the connection is the end of the body

    def data_received(self, data: bytes) -> None:
        self._head_bytes += 0 if self._status else len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserCallbackError as error:
            self._end(_named(error.__context__ or error))
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._end(_named(error))
        if not self._status and self._head_bytes > MAX_HEAD_BYTES:
            self._end(RequestFailed("the head of the answer has no end", kind="malformed"))

    def connection_lost(self, error: Exception | None) -> None:
        if error is None and self._status and not self._says_its_end:
            self._end(None)
        elif not self._first and not self._head_bytes:
            self._end(Stale("the connection was stale"))
        else:
            cause = f" ({error})" if error else ""
            message = f"the connection broke before the answer was whole{cause}"
            self._end(RequestFailed(message, kind="broken stream" if self._status else "connection"))

    def abandon(self) -> None:
        """Nobody waits for the response any more."""
        if not self.done.cancel() and not self.done.cancelled():
            self.done.exception()  # reads the error, which no caller may want any more

    # Called by the parser

    def on_header(self, name: bytes, value: bytes) -> None:
        self._says_its_end |= name.lower() in (b"content-length", b"transfer-encoding")

    def on_headers_complete(self) -> None:
        self._status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        if self._status == 200:
            self._on_body(body)
        elif len(self._refusal) < MAX_REFUSAL_BYTES:
            self._refusal += body

    def on_message_complete(self) -> None:
        if 100 <= self._status < 200:  # an interim answer; the real one follows
            self._status = 0
            return
        self.keeps_open = bool(self._parser.should_keep_alive())
        self._end(None)

    def _end(self, error: Exception | None) -> None:
        if self.done.done():
            return
        if error is None and self._status != 200:
            error = RequestFailed(_sentence(self._status, bytes(self._refusal)), self._status)
        if error is None:
            self.done.set_result(None)
        else:
            self.done.set_exception(error)


def _named(error: BaseException) -> Exception:
    if isinstance(error, RequestFailed | HangUp):
        return error
    return RequestFailed(f"the answer is not what an OpenAI-style server sends: {error!r}", kind="malformed")


def _sentence(status: int, body: bytes) -> str:
    """The refusing server's message: from an OpenAI-style error body, else the status."""
    try:
        return f"{status}: {str(json.loads(body)['error']['message'])[:500]}"
    except (ValueError, KeyError, TypeError, RecursionError):
        return f"the server answered {status}"
