"""Which workers live: status streams of real servers that speak, fall silent, break and come back."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from preft.core.cluster import AdapterState, StatusUpdate, Worker, WorkerState
from preft.router.channels import WorkerChannels
from preft.router.view import ClusterView
from preft.router.watches import MOST_WANTED, Watches
from preft.router.worker_view import WorkerView
from support.fake_workers import FakeCluster, FakePrefill
from support.router_harness import SECRET

TIMEOUT = 1.5  # a fake worker gives a sign of life each second


class Watched:
    """One prefill worker and the watches on it. `news` holds what the owner was told: worker id, came or went."""

    def __init__(self) -> None:
        self.cluster = FakeCluster()
        self.view = ClusterView(8, 0.25)
        self.news: list[tuple[str, bool]] = []
        self.fails = 0  # so many calls of on_news raise
        self.channels = WorkerChannels(SECRET, "router", self.lost)
        self.watches = Watches(self.channels, self.view, TIMEOUT, self.heard)

    def lost(self, worker: Worker) -> None:
        self.watches.lost(worker)

    def heard(self, worker: WorkerView, came_or_went: bool) -> None:
        self.news.append((worker.id, came_or_went))
        if self.fails:
            self.fails -= 1
            raise ValueError("a bug")

    async def read(self) -> None:
        self.view.register(await self.cluster.workers())
        self.watches.follow()

    @property
    def p0(self) -> WorkerView:
        return self.view.workers["p0"]

    async def until(self, condition: Callable[[], bool], seconds: float = 10.0) -> None:
        async with asyncio.timeout(seconds):
            while not condition():
                await asyncio.sleep(0.01)


@asynccontextmanager
async def watched() -> AsyncIterator[tuple[Watched, FakePrefill]]:
    one = Watched()
    worker = await one.cluster.add_prefill("p0", adapters=("a" * 64,))
    await one.read()
    try:
        yield one, worker
    finally:
        await one.watches.close()
        await one.channels.close()
        await one.cluster.stop()
        await one.until(lambda: not +worker.watchers)


async def test_a_worker_is_ready_after_its_first_message() -> None:
    async with watched() as (one, _):
        assert not one.p0.is_ready
        await one.watches.settled(5.0)
        assert one.p0.is_ready
        assert one.p0.holds("a" * 64)
        assert one.news == [("p0", True)]


async def test_changes_are_told() -> None:
    async with watched() as (one, worker):
        await one.watches.settled(5.0)
        worker.tell(other_prompts=3, adapters={"b" * 64: AdapterState.LOADING, "a" * 64: None})
        await one.until(lambda: one.p0.load == 3)
        assert one.p0.is_loading("b" * 64)
        assert not one.p0.holds("a" * 64)
        assert one.news[-1] == ("p0", False)
        worker.state = WorkerState.DRAINING
        await one.until(lambda: one.p0.state is WorkerState.DRAINING)
        assert one.news[-1] == ("p0", True)


async def test_a_worker_whose_engine_stalls_has_gone_until_the_engine_goes_on() -> None:
    async with watched() as (one, worker):
        await one.watches.settled(5.0)
        worker.tell(stalled_seconds=5)
        await one.until(lambda: one.p0.is_stalled)
        assert one.p0.is_ready
        assert one.view.stalled == {"p0"}
        assert one.news[-1] == ("p0", True)
        worker.tell(stalled_seconds=6)
        await one.until(lambda: one.news[-1] == ("p0", False))
        worker.tell(stalled_seconds=0)
        await one.until(lambda: not one.p0.is_stalled)
        assert one.view.stalled == set()
        assert one.news[-1] == ("p0", True)


async def test_a_silent_worker_is_dead_until_it_speaks_again() -> None:
    async with watched() as (one, worker):
        await one.watches.settled(5.0)
        await asyncio.sleep(2 * TIMEOUT)  # nothing changes, but it gives signs of life
        assert one.p0.is_ready
        worker.silent_since = 0.0
        await one.until(lambda: not one.p0.is_ready)
        assert one.p0.state is WorkerState.DEAD
        assert one.news[-1] == ("p0", True)
        await asyncio.sleep(0.3)
        assert not one.p0.is_ready
        worker.silent_since = None
        await one.until(lambda: one.p0.is_ready)
        assert one.news[-1] == ("p0", True)
        assert one.p0.holds("a" * 64)


async def test_a_broken_stream_makes_a_worker_dead_at_once_and_it_comes_back() -> None:
    """At the same address: nothing but the stream tells of it."""
    async with watched() as (one, worker):
        await one.watches.settled(5.0)
        port = int(worker.address.rpartition(":")[2])
        await worker.server.stop(None)
        await one.until(lambda: not one.p0.is_ready, TIMEOUT / 2)
        worker.adapters = ()
        await worker.start(port)
        await one.until(lambda: one.p0.is_ready)
        assert not one.p0.holds("a" * 64)


async def test_a_worker_that_restarts_under_its_id_starts_anew() -> None:
    async with watched() as (one, worker):
        await one.watches.settled(5.0)
        old = one.p0
        await worker.server.stop(None)
        await one.until(lambda: not old.is_ready)
        await worker.start()  # at another address
        await one.read()
        assert one.p0 is not old
        await one.until(lambda: one.p0.is_ready)
        assert not old.is_ready
        assert sum(worker.watchers.values()) == 1


async def test_a_worker_that_leaves_the_registry_is_watched_no_more() -> None:
    async with watched() as (one, worker):
        await one.watches.settled(5.0)
        worker.registered = False
        await one.read()
        await one.until(lambda: not +worker.watchers)
        worker.registered = True
        await one.read()
        await one.until(lambda: one.p0.is_ready)


async def test_a_worker_without_address_is_watched_once_it_has_one() -> None:
    async with watched() as (one, _):
        late = await one.cluster.add_prefill("p1", state=WorkerState.STARTING)
        await one.read()
        await one.watches.settled(5.0)
        assert one.view.workers["p1"].state is WorkerState.STARTING
        late.state = WorkerState.READY
        await one.read()
        await one.until(lambda: one.view.workers["p1"].is_ready)


async def test_a_call_that_broke_makes_a_worker_dead_until_a_new_stream_speaks() -> None:
    """What the old stream still brings may have been sent before."""
    async with watched() as (one, worker):
        await one.watches.settled(5.0)
        worker.silent_since = 0.0
        one.watches.lost(one.p0.worker)
        assert not one.p0.is_ready
        assert one.news[-1] == ("p0", True)
        count = len(one.news)
        one.watches.lost(one.p0.worker)  # its other calls break too
        assert len(one.news) == count
        assert one.p0.failures == 1
        worker.silent_since = None
        await one.until(lambda: one.p0.is_ready)
        await one.until(lambda: sum(worker.watchers.values()) == 1)


async def test_an_unknown_worker_or_an_earlier_process_can_not_be_lost() -> None:
    async with watched() as (one, worker):
        await one.watches.settled(5.0)
        record = worker.record()
        for other in (Worker("x", record.role, record.address), Worker("p0", record.role, "h:1")):
            one.watches.lost(other)
        assert one.p0.is_ready


async def test_a_worker_that_doesnt_answer_holds_nobody_up() -> None:
    async with watched() as (one, worker):
        worker.silent_since = 0.0
        await one.watches.settled(0.1)
        assert not one.p0.is_ready
        await one.cluster.add_prefill("p1")
        await one.read()
        await one.until(lambda: one.view.workers["p1"].is_ready, 2.0)


@pytest.mark.parametrize("where", ["the view", "the owner"])
async def test_after_an_unexpected_exception_in_one_message_the_worker_is_ready_again(
    where: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with watched() as (one, worker):
        await one.watches.settled(5.0)
        if where == "the owner":
            one.fails = 1
        else:
            told, failed = WorkerView.told, list[Any]()

            def breaks(view: WorkerView, update: StatusUpdate, now: float) -> None:
                if not failed:
                    failed.append(update)
                    raise ValueError("a bug")
                told(view, update, now)

            monkeypatch.setattr(WorkerView, "told", breaks)
        with caplog.at_level(logging.CRITICAL):
            count = len(one.news)
            worker.tell(other_prompts=3)
            await one.until(lambda: len(one.news) > count and one.p0.is_ready and one.p0.load == 3)
            assert not one.fails
        await one.until(lambda: sum(worker.watchers.values()) == 1)


async def test_a_worker_hears_for_which_adapters_requests_wait() -> None:
    async with watched() as (one, worker):
        await one.watches.settled(5.0)
        one.p0.queue("a", 1, 1)
        one.p0.queue("", 2, 2)
        await one.until(lambda: worker.wanted["router"] == {"a"})
        one.p0.queue("a", 1, 1)
        one.p0.queue("b", 1, 1)
        one.p0.queue("a", -2, -2)
        await one.until(lambda: worker.wanted["router"] == {"b"})


async def test_a_worker_hears_of_no_more_adapters_than_it_takes() -> None:
    async with watched() as (one, worker):
        await one.watches.settled(5.0)
        names = [f"{number:064x}" for number in range(MOST_WANTED + 500)]
        for name in names:
            one.p0.queue(name, 1, 1)
        await one.until(lambda: worker.wanted["router"] == set(names[:MOST_WANTED]))
        one.p0.queue(names[0], -1, -1)
        await one.until(lambda: worker.wanted["router"] == set(names[1 : MOST_WANTED + 1]))
        assert one.p0.is_ready


async def test_a_worker_hears_again_and_again_for_how_long_a_request_waits_for_a_slot() -> None:
    async with watched() as (one, worker):
        await one.watches.settled(5.0)
        came = asyncio.get_running_loop().time() - 5.0
        one.p0.slot_for = (came, 1, came)
        await one.until(lambda: len(worker.slot_waits) >= 3)
        assert worker.slot_waits == sorted(worker.slot_waits)
        assert 5000 <= worker.slot_waits[0] < worker.slot_waits[-1] < 15_000
        one.p0.slot_for = None
        await one.until(lambda: worker.slot_waits[-1] == 0)
        count = len(worker.slot_waits)
        await asyncio.sleep(1.5)
        assert len(worker.slot_waits) == count


async def test_a_worker_hears_all_wants_again_after_its_stream_broke() -> None:
    async with watched() as (one, worker):
        await one.watches.settled(5.0)
        one.p0.queue("a", 1, 1)
        await one.until(lambda: worker.wanted["router"] == {"a"})
        worker.silent_since = 0.0
        await one.until(lambda: not worker.wanted["router"])
        worker.silent_since = None
        await one.until(lambda: worker.wanted["router"] == {"a"} and one.p0.is_ready)


async def test_closing_ends_all_streams() -> None:
    async with watched() as (one, worker):
        await one.watches.settled(5.0)
        await one.watches.close()
        await one.until(lambda: not +worker.watchers)
