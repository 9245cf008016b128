"""One Decode call with many choices: its commands in, and the choices' tokens out in one message per engine step.

The session owns a task per running choice. `choices` and its subclasses own how a choice is decoded.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator
from functools import partial
from typing import Any

from preft.core.errors import EngineFailed, InvalidRequest, PreftError
from preft.core.request import TokenDelta
from preft.rpc import workers_pb2
from preft.rpc.convert import delta_to_proto
from preft.rpc.prompt_logprobs import part_deltas
from preft.rpc.status import error_to_proto

logger = logging.getLogger(__name__)

Put = Callable[[TokenDelta | PreftError], None]
"""Takes a choice's deltas, the last one with a finish reason, or the error that ended it."""

Serve = Callable[[workers_pb2.DecodeChoice, Put], Coroutine[Any, Any, None]]
"""Runs one choice. The session cancels it when the caller cancels the choice."""


class DecodeSession:
    """One Decode call: starts and cancels choices on command, and gathers their output of one engine step."""

    def __init__(self, begin: Callable[[workers_pb2.DecodeRequest], Serve]) -> None:
        """`begin` is called once per request, for all its choices. If it raises, all of them end with that error."""
        self._begin = begin
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._events: list[workers_pb2.DecodeEvent] = []
        self._changed = asyncio.Event()

    async def run(
        self, commands: AsyncIterator[workers_pb2.DecodeCommand]
    ) -> AsyncGenerator[workers_pb2.DecodeEvents, None]:
        """Yields messages until the caller's commands and all choices have ended. Closing cancels all choices.

        Raises InvalidRequest if the caller reuses the id of a running choice.
        """
        reader = asyncio.create_task(self._read(commands))
        try:
            while not (reader.done() and not self._tasks and not self._events):
                await self._changed.wait()
                self._changed.clear()
                if reader.done():
                    reader.result()
                if self._events:
                    events, self._events = self._events, []
                    for together in _in_messages(events):
                        yield workers_pb2.DecodeEvents(events=together)
        finally:
            tasks = (reader, *self._tasks.values())
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _read(self, commands: AsyncIterator[workers_pb2.DecodeCommand]) -> None:
        try:
            async for command in commands:
                if command.HasField("start"):
                    await self._start(command.start)
                elif command.cancel in self._tasks:
                    self._tasks[command.cancel].cancel()
        finally:
            self._changed.set()

    async def _start(self, request: workers_pb2.DecodeRequest) -> None:
        """Starts the choices one after the other, so that other tasks run in between."""
        try:
            serve = self._begin(request)
        except Exception as error:  # the call's other choices go on
            if not isinstance(error, PreftError):
                logger.exception("request %s broke", request.request_id)
                error = EngineFailed("an internal error ended the request")
            for choice in request.choices:
                self._put(choice.id, error)
            return
        for choice in request.choices:
            if choice.id in self._tasks:
                raise InvalidRequest(f"id {choice.id} is in use")
            task = asyncio.create_task(serve(choice, partial(self._put, choice.id)))
            self._tasks[choice.id] = task
            task.add_done_callback(partial(self._ended, choice.id))
            await asyncio.sleep(0)

    def _put(self, number: int, outcome: TokenDelta | PreftError) -> None:
        if isinstance(outcome, TokenDelta):
            self._events.extend(workers_pb2.DecodeEvent(id=number, delta=part) for part in part_deltas(outcome))
            event = workers_pb2.DecodeEvent(id=number, delta=delta_to_proto(outcome))
        else:
            event = workers_pb2.DecodeEvent(id=number, error=error_to_proto(outcome))
        self._events.append(event)
        self._changed.set()

    def _ended(self, number: int, task: asyncio.Task[None]) -> None:
        del self._tasks[number]
        broken = task.cancelled() or task.exception() is not None
        if broken and not task.cancelling():  # not cancelled by the session: without an error the caller waits for ever
            logger.error(
                "choice %d ended without a word", number, exc_info=None if task.cancelled() else task.exception()
            )
            self._put(number, EngineFailed("an internal error ended the request"))
        self._changed.set()


def _in_messages(events: list[workers_pb2.DecodeEvent]) -> Iterator[list[workers_pb2.DecodeEvent]]:
    """The events that go into one message: all, but a part of a prompt's log probabilities ends its message."""
    together: list[workers_pb2.DecodeEvent] = []
    for event in events:
        together.append(event)
        if event.delta.HasField("prompt_logprobs"):
            yield together
            together = []
    if together:
        yield together
