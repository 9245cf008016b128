"""Carries a running completion over HTTP, as server-sent events or as one JSON body, until its end or a disconnect.

A reply starts with its first tokens, so an earlier failure is a plain HTTP error. A later failure is an event
`data: {"error": {...}}` followed by `data: [DONE]`, as in vLLM: no choice gets a false finish_reason.
"""

from __future__ import annotations

import logging
from contextlib import suppress

from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from preft.core.errors import PreftError
from preft.gateway.completion import Completion
from preft.gateway.http.disconnect import while_connected
from preft.gateway.http.errors import error_body
from preft.gateway.http.events import DONE, event, send_events, start_events
from preft.gateway.http.reply import Shape, WholeChoice

_log = logging.getLogger(__name__)


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
        choices = [WholeChoice(index) for index in range(len(completion.call.requests) * completion.call.n)]
        while deltas := await completion.take():
            for delta in deltas:
                choices[delta.index].add(delta)
        joined = [choice.joined() for choice in choices]
        body = self._shape.whole(joined, completion.cached_tokens, completion.reasoning_tokens)
        headers = {"x-request-id": self._id, **dict(completion.headers)}
        await JSONResponse(body, headers=headers)(scope, receive, send)


class EventStream(_Reply):
    """The answer as server-sent events. One write carries all deltas that are ready."""

    async def _write(self, completion: Completion, scope: Scope, receive: Receive, send: Send) -> None:
        deltas = await completion.take()
        own = [(name.encode(), value.encode()) for name, value in completion.headers]
        await start_events(send, (b"x-request-id", self._id.encode()), *own)
        chunk = self._shape.chunk
        try:
            while deltas:
                if events := "".join(map(chunk, deltas)):
                    await send_events(send, events)
                deltas = await completion.take()
            last = self._shape.end(completion.cached_tokens, completion.reasoning_tokens) + DONE
        except Exception as error:  # the status is sent: the error must go into the stream
            if not isinstance(error, PreftError):
                _log.exception("request %s failed in its stream", self._id)
            last = event(error_body(error)) + DONE
        await send_events(send, last, last=True)
