"""A router over fake workers, and the checks after its requests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from preft.core.request import FinishReason, GenerateRequest
from preft.core.settings import RouterSettings
from preft.router.router import Router
from preft.rpc.secret import ClusterSecret
from support.fake_workers import EOS, FakeCluster, FakeDecode, FakePrefill, FakeWorker, digest_of

H = TypeVar("H", bound="Harness")
SECRET = ClusterSecret("of the tests")
FAST = RouterSettings(poll_interval=0.02, patience=0.2, transfer_timeout=2.0, retries=2, restart_grace=0.3)


class Harness:
    """A cluster and its router, at first with one prefill and one decode worker."""

    def __init__(self) -> None:
        self.cluster = FakeCluster()

    async def start(self, settings: RouterSettings) -> None:
        await self.add_workers()
        self.router = Router(self.cluster, settings, SECRET)  # type: ignore[arg-type]
        await self.router.start()

    async def add_workers(self) -> None:
        self.p = await self.cluster.add_prefill("p0", adapters=tuple(map(digest_of, ("ada", "bob", "cyd"))))
        self.d = await self.cluster.add_decode("d0")

    async def second(self) -> tuple[FakePrefill, FakeDecode]:
        pair = await self.cluster.add_prefill("p1"), await self.cluster.add_decode("d1")
        await self.known()
        return pair

    async def known(self) -> None:
        """Waits until the router has each living worker's present registration, and has heard of its state."""

        def told(worker: FakeWorker) -> bool:
            view = self.router.view.workers.get(worker.id)
            return view is not None and view.worker == worker.record() and view.status is not None

        members = self.cluster.members.values()
        await self.seen(lambda: all(told(worker) for worker in members if worker.silent_since is None))

    async def seen(self, condition: Any) -> None:
        for _ in range(300):
            if condition():
                return
            await asyncio.sleep(0.01)
        raise AssertionError("it never came")

    @property
    def idle(self) -> bool:
        """Whether the router has nothing reserved anywhere."""
        return all(view.idle for view in self.router.view.workers.values())

    async def clean(self) -> None:
        """Checks that every reservation, open call and handle is gone within three seconds."""
        for _ in range(300):
            if not self.cluster.busy and self.idle:
                break
            await asyncio.sleep(0.01)
        assert self.cluster.busy == {}
        assert self.router.stats().in_flight == {}
        assert self.router.stats().waiting == 0
        assert self.idle

    async def collect(self, request: GenerateRequest) -> dict[int, list[int]]:
        """All choices' tokens. Checks that each choice was finished once, at its end."""
        streams: dict[int, list[int]] = {index: [] for index in range(request.n)}
        finished: set[int] = set()
        async with self.router.generate(request) as generation:
            async for delta in generation:
                assert delta.index not in finished
                streams[delta.index] += delta.token_ids
                if delta.finish_reason is not None:
                    finished.add(delta.index)
                    by_eos = streams[delta.index][-1] == EOS
                    assert delta.finish_reason is (FinishReason.STOP if by_eos else FinishReason.LENGTH)
        assert finished == set(range(request.n))
        return streams


@asynccontextmanager
async def running(harness: H, **changes: Any) -> AsyncIterator[H]:
    """`harness`, started. `changes` are settings that differ from FAST. Checks at the end that nothing is left."""
    await harness.start(FAST.model_copy(update=changes))
    try:
        yield harness
        await harness.clean()
    finally:
        await harness.router.close()
        await harness.cluster.stop()
