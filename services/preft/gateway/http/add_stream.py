"""Adds an adapter while the client watches: progress as server-sent events, then the entry or the error.

The HTTP status is sent before the download begins, so that no proxy gives up on a long download.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from preft.core.cluster import Adapter
from preft.core.errors import PreftError
from preft.core.ports import Progress
from preft.gateway.http.adapter_json import adapter_json
from preft.gateway.http.disconnect import while_connected
from preft.gateway.http.errors import error_body
from preft.gateway.http.events import DONE, event, send_events, start_events

_log = logging.getLogger(__name__)

EVENT_SECONDS = 0.1  # the shortest time between two progress events
QUIET_SECONDS = 15.0  # after this silence, a comment shows that the connection lives


class AddStream(Response):
    """The events of one `add`. The response starts `add`; a client that disconnects cancels it."""

    def __init__(self, add: Callable[[Progress], Awaitable[Adapter]]) -> None:
        super().__init__()
        self._add = add
        self._latest: tuple[int, int | None] | None = None  # replaced as a whole, from any thread

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await start_events(send)
        with suppress(ClientDisconnect):
            await while_connected(receive, self._write(send))

    async def _write(self, send: Send) -> None:
        adding = asyncio.create_task(self._result())
        try:
            await self._tell_progress(adding, send)
            await send_events(send, event(adding.result()) + DONE, last=True)
        finally:
            adding.cancel()
            await asyncio.gather(adding, return_exceptions=True)

    async def _result(self) -> dict[str, Any]:
        try:
            return {"adapter": adapter_json(await self._add(self._report))}
        except Exception as error:  # the status is sent: the error must go into the stream
            if not isinstance(error, PreftError):
                _log.exception("adding an adapter failed in its stream")
            return error_body(error)

    def _report(self, done: int, total: int | None) -> None:
        self._latest = (done, total)

    async def _tell_progress(self, adding: asyncio.Task[Any], send: Send) -> None:
        """Sends progress until the addition ends."""
        told = None
        told_at = time.monotonic()
        while not adding.done() or self._latest != told:
            latest = self._latest
            quiet = time.monotonic() - told_at > QUIET_SECONDS
            if latest != told and latest is not None:
                news = event({"bytes": latest[0], "total": latest[1]})
            else:
                news = ": still adding\n\n" if quiet else ""
            if news:
                await send_events(send, news)
                told, told_at = latest, time.monotonic()
            await asyncio.wait({adding}, timeout=EVENT_SECONDS)
