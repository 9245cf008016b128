"""Carries a running completion over HTTP, as server-sent events or as one JSON body, until its end or a disconnect.

A reply starts with its first tokens, so an earlier failure is a plain HTTP error. A later failure is an event
`data: {"error": {...}}` followed by `data: [DONE]`, as in vLLM: no choice gets a false finish_reason.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from preft.core.errors import PreftError
from preft.gateway.completion import Completion
from preft.gateway.http.disconnect import while_connected
from preft.gateway.http.errors import error_body
from preft.gateway.http.events import DONE, event, send_events, start_events
from preft.gateway.http.reply import Shape, WholeChoice
from preft.gateway.text.choice import ChoiceDelta

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
        write = partial(self._shape.whole_json, joined, completion.cached_tokens, completion.reasoning_tokens)
        body = await asyncio.to_thread(write) if completion.call.shows_long_prompt else write()
        headers = {"x-request-id": self._id, **dict(completion.headers)}
        await Response(body, media_type="application/json", headers=headers)(scope, receive, send)


class EventStream(_Reply):
    """The answer as server-sent events. One write carries all deltas that are ready."""

    async def _write(self, completion: Completion, scope: Scope, receive: Receive, send: Send) -> None:
        deltas = await completion.take()
        own = [(name.encode(), value.encode()) for name, value in completion.headers]
        await start_events(send, (b"x-request-id", self._id.encode()), *own)
        chunk = self._shape.chunk
        is_large = completion.call.shows_long_prompt
        try:
            while deltas:
                if is_large and any(delta.prompt_logprobs is not None for delta in deltas):
                    events = await asyncio.to_thread(_joined, chunk, deltas)
                else:
                    events = _joined(chunk, deltas)
                if events:
                    await send_events(send, events)
                deltas = await completion.take()
            last = self._shape.end(completion.cached_tokens, completion.reasoning_tokens) + DONE
        except Exception as error:  # the status is sent: the error must go into the stream
            if not isinstance(error, PreftError):
                _log.exception("request %s failed in its stream", self._id)
            last = event(error_body(error)) + DONE
        await send_events(send, last, last=True)


def _joined(chunk: Callable[[ChoiceDelta], str], deltas: Iterable[ChoiceDelta]) -> str:
    return "".join(map(chunk, deltas))
