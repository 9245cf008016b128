"""ASGI middleware that puts HTTP requests under a `Drain`: each request ends whole, or with an error.

Reads (GET, HEAD, OPTIONS) pass: monitoring must work until the server's end.
"""

from __future__ import annotations

from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from preft.core.errors import ShuttingDown
from preft.gateway.drain import Drain
from preft.gateway.http.errors import error_response, failure_events
from preft.gateway.http.events import FAILURE, send_events

_READS = ("GET", "HEAD", "OPTIONS")


class DrainRequests:
    """A refused request gets 503. An interrupted request gets 503, or an error event if its event stream is open."""

    def __init__(self, app: ASGIApp, drain: Drain) -> None:
        self._app = app
        self._drain = drain

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in _READS:
            await self._app(scope, receive, send)
            return
        reply = _Reply(send)
        scope[FAILURE] = reply.failure
        try:
            async with self._drain.running():
                await self._app(scope, receive, reply.send)
        except ShuttingDown as error:
            await reply.end_with(error, scope, receive)


class _Reply:
    """The parts of the reply that were sent."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._started = False
        self._is_open_stream = False
        self.failure: list[Callable[[BaseException], str]] = [failure_events]

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._started = True
            headers = dict(message["headers"])
            self._is_open_stream = headers.get(b"content-type", b"").startswith(b"text/event-stream")
        elif not message.get("more_body", False):
            self._is_open_stream = False
        await self._send(message)

    async def end_with(self, error: ShuttingDown, scope: Scope, receive: Receive) -> None:
        if not self._started:
            response = error_response(error, scope["path"])
            response.headers["connection"] = "close"
            await response(scope, receive, self._send)
        elif self._is_open_stream:
            await send_events(self._send, self.failure[-1](error), last=True)
