"""A caller of WorkerStatus.Watch that keeps what it has heard, as a router does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from preft.core.cluster import AdapterStatus, StatusUpdate, WorkerStatus
from preft.rpc import workers_pb2, workers_pb2_grpc
from preft.rpc.convert import status_from_proto
from preft.rpc.secret import ClusterChannel, ClusterSecret

SECRET = ClusterSecret("of no cluster")


class Watcher:
    """The knowledge of one caller. `updates` are the messages so far."""

    def __init__(self) -> None:
        self.status = WorkerStatus()
        self.adapters: dict[str, AdapterStatus] = {}
        self.updates: list[StatusUpdate] = []
        self.came = asyncio.Condition()

    async def read(self, stream: AsyncIterator[workers_pb2.StatusUpdate]) -> None:
        previous: WorkerStatus | None = None
        async for message in stream:
            update = status_from_proto(message, previous)
            previous = self.status = update.status
            if update.is_whole:
                self.adapters.clear()
            self.adapters |= update.adapters
            self.updates.append(update)
            async with self.came:
                self.came.notify_all()

    def knows(self, digest: str) -> AdapterStatus:
        return self.adapters.get(digest, AdapterStatus(None))

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(10), self.came:
            await self.came.wait_for(condition)


@asynccontextmanager
async def watching(
    address: str, caller: str, secret: ClusterSecret = SECRET, *, interval: float = 0.02
) -> AsyncIterator[tuple[Watcher, ClusterChannel]]:
    """A watcher of the worker at `address`, and a channel to it under the same name."""
    watcher = Watcher()
    async with ClusterChannel(address, secret, caller=caller) as channel:
        stream = workers_pb2_grpc.WorkerStatusStub(channel).Watch([workers_pb2.WatchRequest(interval=interval)])
        reading = asyncio.create_task(watcher.read(stream))
        try:
            yield watcher, channel
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
