"""The router's end of a decode worker's token stream: many choices over one gRPC call.

One message carries a whole decode step of, say, 64 sequences, because a message's fixed cost in Python is about that of
the rest of a token's path. The stream doesn't retry: a broken stream fails its choices, and `channels` opens another.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any

import grpc.aio

from preft.core.errors import DeadlineExceeded, EngineFailed, PreftError, WorkerLost
from preft.rpc import common_pb2, workers_pb2
from preft.rpc.status import error_from_proto, error_from_rpc

logger = logging.getLogger(__name__)


class CallCancelled(Exception):
    """This process cancelled the call."""


class DecodeCall:
    """One choice that a worker decodes. Read it to its end or cancel it."""

    def __init__(self, forget: Callable[[], None], timeout: float) -> None:
        self._items: asyncio.Queue[common_pb2.TokenDelta | Exception] = asyncio.Queue()
        self._forget: Callable[[], None] | None = forget
        late = DeadlineExceeded(f"decoding wasn't finished within {timeout:.1f} s")
        self._timer = asyncio.get_running_loop().call_later(timeout, self._abandon, late)

    async def read(self) -> common_pb2.TokenDelta:
        """Returns the next delta; the last one has a finish reason. `read` runs once per token.

        Raises the PreftError that ended the choice, or CallCancelled.
        """
        item = await self._items.get()
        if isinstance(item, Exception):
            self._items.put_nowait(item)  # a second read raises the same error
            raise item
        return item

    def cancel(self) -> None:
        """Ends the choice, here and on the worker. Does nothing if it has ended."""
        self._abandon(CallCancelled())

    def put(self, delta: common_pb2.TokenDelta) -> None:
        """Called by the stream with each delta."""
        self._items.put_nowait(delta)

    def end(self, error: Exception | None) -> None:
        """Called by the stream when no more deltas come."""
        self._timer.cancel()
        self._forget = None
        if error is not None:
            self._items.put_nowait(error)

    def _abandon(self, reason: Exception) -> None:
        if self._forget is not None:
            self._forget()
            self.end(reason)


class DecodeStream:
    """One gRPC call to one worker, from its first choice until the call breaks or is closed."""

    def __init__(self, stub: Any, peer: str, on_lost: Callable[[], None]) -> None:
        """`stub` is a DecodeWorkerStub. `on_lost` is called when the loss of the worker ends one choice or all."""
        self._peer = peer
        self._on_lost = on_lost
        self._ids = itertools.count(1)
        self._calls: dict[int, DecodeCall] = {}
        self._commands: asyncio.Queue[workers_pb2.DecodeCommand | None] = asyncio.Queue()
        self._stream = stub.Decode(self._send())
        self._task = asyncio.create_task(self._receive())

    @property
    def broken(self) -> bool:
        """Whether the call has ended and takes no more choices."""
        return self._task.done()

    def start(self, request: workers_pb2.DecodeRequest, timeout: float) -> list[DecodeCall]:
        """Begins the request's choices, and sets their ids. Each ends with DeadlineExceeded after `timeout` seconds.

        The calls are in the order of the choices.
        """
        calls = []
        for choice in request.choices:
            choice.id = next(self._ids)
            call = self._calls[choice.id] = DecodeCall(partial(self._cancel, choice.id), timeout)
            calls.append(call)
        self._commands.put_nowait(workers_pb2.DecodeCommand(start=request))
        return calls

    async def finish(self, seconds: float) -> None:
        """Takes no more choices; waits at most `seconds` for running ones, then closes."""
        self._commands.put_nowait(None)
        await asyncio.wait({self._task}, timeout=seconds)
        await self.close()

    async def close(self) -> None:
        """Ends running choices with WorkerLost."""
        self._task.cancel()
        await asyncio.wait({self._task})
        self._end(self._closed())  # a task that is cancelled before its first step never reaches its own `finally`

    def _closed(self) -> WorkerLost:
        return WorkerLost(f"worker {self._peer}: the connection to it was closed")

    def _cancel(self, number: int) -> None:
        del self._calls[number]
        self._commands.put_nowait(workers_pb2.DecodeCommand(cancel=number))

    async def _send(self) -> AsyncIterator[workers_pb2.DecodeCommand]:
        while (command := await self._commands.get()) is not None:
            yield command

    async def _receive(self) -> None:
        error: Exception = EngineFailed(f"worker {self._peer}: its token stream broke")
        try:
            async for message in self._stream:
                for event in message.events:
                    self._take(event)
            error = WorkerLost(f"worker {self._peer}: it ended the token stream")
        except grpc.aio.AioRpcError as rpc_error:
            error = error_from_rpc(rpc_error, self._peer)
        except asyncio.CancelledError:
            error = self._closed()
            raise
        except Exception:
            logger.exception("%s", error)
        finally:
            self._end(error)

    def _end(self, error: Exception) -> None:
        """Ends all running choices, here and on the worker."""
        self._stream.cancel()  # gRPC keeps a call running whose reader is cancelled before the first message
        calls = list(self._calls.values())
        self._calls.clear()
        for call in calls:
            call.end(error)
        if type(error) is WorkerLost and calls:
            self._on_lost()

    def _take(self, event: workers_pb2.DecodeEvent) -> None:
        call = self._calls.get(event.id)
        if call is None:
            return  # this process has cancelled the choice, and the worker doesn't know yet
        if event.HasField("delta"):
            call.put(event.delta)
            if not event.delta.finish_reason:
                return
            error: PreftError | None = None
        else:
            error = error_from_proto(event.error)
        del self._calls[event.id]
        call.end(error)
        if type(error) is WorkerLost:
            self._on_lost()
