"""The status stream of a fake worker: the truth about the fake, with the lies that a test tells through it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from preft.core.cluster import AdapterState, AdapterStatus, StatusUpdate, WorkerState, WorkerStatus
from preft.rpc import workers_pb2, workers_pb2_grpc
from preft.rpc.caller import caller_of
from preft.rpc.convert import status_to_proto

if TYPE_CHECKING:
    from support.fake_workers import FakeWorker

SIGN_OF_LIFE = 1.0  # seconds


class FakeStatusService(workers_pb2_grpc.WorkerStatusServicer):
    def __init__(self, worker: FakeWorker) -> None:
        self.worker = worker

    async def Watch(
        self, requests: AsyncIterator[workers_pb2.WatchRequest], context: Any
    ) -> AsyncIterator[workers_pb2.StatusUpdate]:
        worker, caller = self.worker, caller_of(context)
        request = await anext(requests)
        reading = asyncio.create_task(self._read(requests, caller))
        worker.watchers[caller] += 1
        loop = asyncio.get_running_loop()
        last: StatusUpdate | None = None
        told_at = 0.0
        try:
            while True:
                now = status_of(worker, caller)
                due = last is None or loop.time() - told_at >= SIGN_OF_LIFE
                if worker.silent_since is None and (due or now != last):
                    yield status_to_proto(changes(now, last), last.status if last else None)
                    last, told_at = now, loop.time()
                await asyncio.sleep(request.interval)
        finally:
            reading.cancel()
            worker.wanted[caller].clear()
            worker.watchers[caller] -= 1

    async def _read(self, requests: AsyncIterator[workers_pb2.WatchRequest], caller: str) -> None:
        async for request in requests:
            self.worker.wanted[caller] -= set(request.unwanted)
            self.worker.wanted[caller] |= set(request.wanted)
            self.worker.slot_waits.append(request.slot_wait_ms)


def status_of(worker: FakeWorker, caller: str) -> StatusUpdate:
    """The whole status, as this caller is told it."""
    prompts, tokens = worker.usage.other_work(caller)
    truth = WorkerStatus(
        draining=worker.state is WorkerState.DRAINING,
        running=worker.running,
        staging_bytes_fit=worker.staging_bytes,
        other_prompts=prompts,
        other_prompt_tokens=tokens,
        other_sequences=worker.usage.other_sequences(caller),
    )
    states: dict[str, AdapterState | None] = dict.fromkeys(worker.usage.prompted)
    if worker.lists_adapters:
        states |= dict.fromkeys(worker.loading, AdapterState.LOADING)
        states |= dict.fromkeys(worker.adapters, AdapterState.HOST)
        states |= {digest: AdapterState.SLOT for digest in worker.usage.prompted if digest in worker.adapters}
    states |= worker.told_adapters
    others: Mapping[str, int] = {
        digest: worker.told_others.get(digest, worker.usage.other_prompts(caller, digest))
        for digest in states.keys() | worker.told_others.keys()
    }
    adapters = {digest: AdapterStatus(states.get(digest), others[digest]) for digest in others}
    known = {digest: adapter for digest, adapter in adapters.items() if adapter != AdapterStatus(None)}
    return StatusUpdate(replace(truth, **worker.told), known, is_whole=True)


def changes(now: StatusUpdate, last: StatusUpdate | None) -> StatusUpdate:
    """The update that turns `last` into `now`."""
    if last is None:
        return now
    gone = dict.fromkeys(last.adapters.keys() - now.adapters.keys(), AdapterStatus(None))
    changed = {digest: adapter for digest, adapter in now.adapters.items() if last.adapters.get(digest) != adapter}
    return StatusUpdate(now.status, gone | changed)
