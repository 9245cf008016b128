"""Carries a running completion over HTTP, as server-sent events or as one JSON body, until its end or a disconnect.

A reply starts with its first tokens, so an earlier failure is a plain HTTP error. A later failure is an event in the
form of the stream's API: no choice gets a false finish_reason.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from typing import Protocol

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from preft.core.errors import PreftError
from preft.gateway.completion import Completion
from preft.gateway.http.disconnect import while_connected
from preft.gateway.http.events import FAILURE, send_events, start_events
from preft.gateway.text.choice import ChoiceDelta

_log = logging.getLogger(__name__)


class Shape(Protocol):
    """The format of one reply. The reply is either a stream (`start`, `chunk`..., `end`) or whole (`add`..., `reply`).

    `cached_tokens` counts the prompt tokens found in prefix caches so far. `reasoning_tokens` None: the server doesn't
    parse reasoning.
    """

    def start(self, cached_tokens: int) -> str:
        """The events before the first delta's."""

    def chunk(self, delta: ChoiceDelta) -> str:
        """The events for `delta`; empty if `delta` shows nothing new."""

    def end(self, cached_tokens: int, reasoning_tokens: int | None) -> str:
        """The events after the last delta's."""

    def failure(self, error: BaseException) -> str:
        """The last events of a stream that fails."""

    def add(self, delta: ChoiceDelta) -> None:
        """Takes a delta of a whole reply."""

    def reply(self, cached_tokens: int, reasoning_tokens: int | None) -> str:
        """The JSON text of the whole reply, after its last delta."""


class _Reply(Response):
    """A response that runs the completion itself: a disconnect cancels the completion at once."""

    def __init__(self, completion: Completion, shape: Shape) -> None:
        super().__init__()
        self._completion = completion
        self._shape = shape
        self._id = completion.call.id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with suppress(ClientDisconnect):
            await while_connected(receive, self._run(scope, receive, send))

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._completion as completion:
            await self._write(completion, scope, receive, send)

    async def _write(self, completion: Completion, scope: Scope, receive: Receive, send: Send) -> None:
        raise NotImplementedError


class WholeReply(_Reply):
    """The whole answer as one JSON body."""

    async def _write(self, completion: Completion, scope: Scope, receive: Receive, send: Send) -> None:
        while deltas := await completion.take():
            for delta in deltas:
                self._shape.add(delta)
        write = partial(self._shape.reply, completion.cached_tokens, completion.reasoning_tokens)
        body = await asyncio.to_thread(write) if completion.call.shows_long_prompt else write()
        headers = {"x-request-id": self._id, **dict(completion.headers)}
        await Response(body, media_type="application/json", headers=headers)(scope, receive, send)


class EventStream(_Reply):
    """The answer as server-sent events. One write carries all deltas that are ready."""

    async def _write(self, completion: Completion, scope: Scope, receive: Receive, send: Send) -> None:
        deltas = await completion.take()
        own = [(name.encode(), value.encode()) for name, value in completion.headers]
        await start_events(send, (b"x-request-id", self._id.encode()), *own)
        if (failure := scope.get(FAILURE)) is not None:
            failure.append(self._shape.failure)
        events = self._shape.start(completion.cached_tokens)
        chunk = self._shape.chunk
        is_large = completion.call.shows_long_prompt
        try:
            while deltas:
                if is_large and any(delta.prompt_logprobs is not None for delta in deltas):
                    events += await asyncio.to_thread(_joined, chunk, deltas)
                else:
                    events += _joined(chunk, deltas)
                if events:
                    await send_events(send, events)
                events = ""
                deltas = await completion.take()
            last = self._shape.end(completion.cached_tokens, completion.reasoning_tokens)
        except Exception as error:  # the status is sent: the error must go into the stream
            if not isinstance(error, PreftError):
                _log.exception("request %s failed in its stream", self._id)
            last = self._shape.failure(error)
        await send_events(send, last, last=True)


def _joined(chunk: Callable[[ChoiceDelta], str], deltas: Iterable[ChoiceDelta]) -> str:
    return "".join(map(chunk, deltas))
