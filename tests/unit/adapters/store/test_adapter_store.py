"""A worker's adapter store: loaded once, there while it is used, right or not at all.

The engine is fake, but looks into the memory that it was told of, and fails a test that finds other bytes there.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import random
import shutil
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

import pytest

from preft.adapters.formats.digest import LORA_FILES, adapter_digest
from preft.adapters.sources.fetch_threads import PER_PLACE
from preft.adapters.sources.limits import SourceLimits
from preft.adapters.store.adapter_store import AdapterStore
from preft.adapters.store.disk_tier import DiskTier
from preft.adapters.store.packed import AdapterFiles
from preft.core.cluster import AdapterState, Role, Tier
from preft.core.errors import AdapterUnavailable, EngineFailed, PreftError, Unavailable, WorkerLost
from preft.core.request import AdapterRef, Sampling
from preft.engine.port import EngineRequest
from preft.memory.arena import Region, StagingArena, span_of
from support.fake_engine import FakeEngine
from support.faulty_http import FaultyServer, serve_folder
from support.worker_services import until

CONFIG, WEIGHTS = LORA_FILES
SIZE = 1000
THREE = 3  # adapters that fit into host memory, unless a test says otherwise


def write(folder: Path, size: int = SIZE, seed: str = "") -> AdapterRef:
    """An adapter of `size` bytes whose source is `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_bytes(b"{}")
    (folder / WEIGHTS).write_bytes(random.Random(folder.name + seed).randbytes(size - 2))
    return AdapterRef(folder.name, adapter_digest(folder), str(folder))


def packed_span(folder: Path) -> int:
    files = AdapterFiles(folder)
    files.close()
    return span_of(files.packed_size)


class HesitantEngine(FakeEngine):
    """Says that it is done with aborted requests only when `settled` is set."""

    def __init__(self, role: Role, arena: str, adapter_arena: str) -> None:
        super().__init__(role, arena, adapter_arena)
        self.settled = asyncio.Event()
        self.asked = 0

    async def between_steps(self) -> None:
        self.asked += 1
        await self.settled.wait()


class SlowEngine(FakeEngine):
    """Takes those in `slow` only when that event is set."""

    def __init__(self, role: Role, arena: str, adapter_arena: str) -> None:
        super().__init__(role, arena, adapter_arena)
        self.slow: dict[str, asyncio.Event] = {}  # by digest

    async def place_adapter(self, adapter: AdapterRef, region: Region) -> None:
        await super().place_adapter(adapter, region)
        if adapter.digest in self.slow:
            await self.slow[adapter.digest].wait()


class LostEngine(FakeEngine):
    """Is gone when it is asked about aborted requests."""

    async def between_steps(self) -> None:
        raise WorkerLost("the engine died")


class Rig:
    """A store with its disk, its memory and its engine."""

    def __init__(self, store: AdapterStore, disk: DiskTier, memory: StagingArena, engine: FakeEngine) -> None:
        self.store = store
        self.disk = disk
        self.memory = memory
        self.engine = engine

    async def serve(self, adapter: AdapterRef) -> None:
        """A request, which the engine runs with the adapter as it is in memory."""
        async with self.store.using(adapter):
            await self.step(adapter)

    async def step(self, adapter: AdapterRef) -> None:
        request = EngineRequest("r", (1, 2, 3), Sampling(1), adapter=adapter)
        async with contextlib.aclosing(self.engine.generate(request)) as deltas:
            assert [delta.finish_reason async for delta in deltas] == ["length"]

    @asynccontextmanager
    async def held(self, *adapters: AdapterRef) -> AsyncIterator[None]:
        """Inside, requests use these."""
        async with contextlib.AsyncExitStack() as stack:
            for adapter in adapters:
                await stack.enter_async_context(self.store.using(adapter))
            yield

    def tier(self, adapter: AdapterRef) -> Tier:
        """The nearest tier with the adapter."""
        state = self.store.state(adapter.digest)
        if state in (AdapterState.SLOT, AdapterState.HOST):
            return Tier.SLOT if state is AdapterState.SLOT else Tier.HOST
        return Tier.DISK if self.disk.has(adapter.digest) else Tier.SOURCE

    def is_unused(self, adapter: AdapterRef) -> bool:
        return not self.store._users[adapter.digest]

    def in_host(self) -> set[str]:
        return {digest for digest, state in self.store.states().items() if state is not AdapterState.LOADING}


@asynccontextmanager
async def rig(
    tmp_path: Path,
    *,
    host_bytes: int | None = None,
    disk_bytes: int = 1_000_000,
    engine: type[FakeEngine] = FakeEngine,
    slots: int = 2,
    source_timeout: float = 5.0,
    room_timeout: float = 10.0,
) -> AsyncIterator[Rig]:
    """By default host memory holds three adapters of SIZE. Afterwards nobody may use one."""
    if host_bytes is None:
        write(tmp_path / "measured")
        host_bytes = THREE * packed_span(tmp_path / "measured")
    memory, kv = StagingArena.create(host_bytes), StagingArena.create(4096)
    disk = DiskTier(tmp_path / "disk", disk_bytes, disk_bytes)
    made = engine(Role.PREFILL, kv.path, memory.path)
    store = AdapterStore(disk, memory, made, slots, SourceLimits(source_timeout), room_timeout=room_timeout)
    try:
        yield Rig(store, disk, memory, made)
    finally:
        await store.close()
        await made.close()
        memory.close()
        kv.close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FaultyServer]:
    (tmp_path / "served").mkdir()
    with serve_folder(tmp_path / "served") as server:
        yield server


def served(server: FaultyServer, tmp_path: Path, name: str, size: int = SIZE) -> AdapterRef:
    """An adapter on the web server."""
    return AdapterRef(name, write(tmp_path / "served" / name, size).digest, f"{server.url}/{name}")


def fetches(server: FaultyServer, adapter: AdapterRef) -> int:
    return server.requests.count(f"GET /{adapter.name}/{WEIGHTS}")


# Loads


async def test_many_requests_for_one_cold_adapter_are_one_load(tmp_path: Path, server: FaultyServer) -> None:
    ann, bob = (served(server, tmp_path, name) for name in ("ann", "bob"))
    async with rig(tmp_path) as the:
        await asyncio.gather(*(the.serve(adapter) for adapter in (ann, bob) for _ in range(50)))
        await the.serve(ann)
        assert (fetches(server, ann), fetches(server, bob)) == (1, 1)
        assert sorted(the.engine.loaded) == sorted((ann.digest, bob.digest))
        assert the.store.totals().loads == {Tier.SOURCE: 2}


async def test_the_nearest_tier_is_used(tmp_path: Path, server: FaultyServer) -> None:
    ann = served(server, tmp_path, "ann")
    async with rig(tmp_path) as the:
        assert the.tier(ann) is Tier.SOURCE
        await the.serve(ann)
        assert the.tier(ann) is Tier.SLOT
        first = the.store.totals()
        assert (dict(first.hits), dict(first.loads)) == ({Tier.SOURCE: 1}, {Tier.SOURCE: 1})
        the.store.forget([ann.digest])
        assert the.tier(ann) is Tier.DISK
        await the.store.prefetch(ann)
        assert the.tier(ann) is Tier.HOST
        for _ in range(3):  # the first one counts for the load that was made for it
            await the.serve(ann)
        load = the.store.totals()
        assert dict(load.hits) == {Tier.SOURCE: 1, Tier.DISK: 1, Tier.SLOT: 2}
        assert dict(load.loads) == {Tier.SOURCE: 1, Tier.DISK: 1}
        assert all(load.load_seconds[tier] > 0 for tier in (Tier.SOURCE, Tier.DISK))
        assert load.load_seconds[Tier.SOURCE] == first.load_seconds[Tier.SOURCE]
        assert fetches(server, ann) == 1


async def test_wanted_adapters_are_evicted_after_others(tmp_path: Path) -> None:
    ann, bob, cyd, dan, eve, fay = (write(tmp_path / name) for name in ("ann", "bob", "cyd", "dan", "eve", "fay"))
    async with rig(tmp_path) as the:
        for adapter in (ann, bob, cyd):
            await the.serve(adapter)
        the.store.want([ann.digest, fay.digest])
        the.store.want([ann.digest])
        await the.serve(dan)
        assert (the.tier(ann), the.tier(bob)) == (Tier.HOST, Tier.DISK)
        the.store.unwant([ann.digest])
        await the.serve(eve)
        await the.serve(fay)
        assert the.tier(ann) is Tier.HOST
        the.store.unwant([ann.digest])
        for adapter in (bob, cyd):
            await the.serve(adapter)
        assert the.tier(ann) is Tier.DISK
        assert the.tier(fay) is Tier.HOST  # still wanted


async def test_more_wanted_adapters_than_memory_holds(tmp_path: Path) -> None:
    adapters = [write(tmp_path / str(number)) for number in range(7)]
    async with rig(tmp_path) as the:
        the.store.want([adapter.digest for adapter in adapters])
        for adapter in adapters * 2:
            await the.serve(adapter)
        assert the.store.totals().host_adapters == THREE


async def test_prefetching_what_is_there_or_on_its_way_costs_nothing(tmp_path: Path, server: FaultyServer) -> None:
    ann = served(server, tmp_path, "ann")
    async with rig(tmp_path) as the:
        await asyncio.gather(the.store.prefetch(ann), the.store.prefetch(ann), the.serve(ann))
        await the.store.prefetch(ann)
        assert fetches(server, ann) == 1
        assert the.engine.loaded == [ann.digest]


async def test_two_workers_of_a_machine_share_the_disk(tmp_path: Path, server: FaultyServer) -> None:
    ann = served(server, tmp_path, "ann")
    async with rig(tmp_path) as one, rig(tmp_path) as two:
        await one.serve(ann)
        await two.serve(ann)
        assert dict(two.store.totals().loads) == {Tier.DISK: 1}
        assert fetches(server, ann) == 1


async def test_a_failing_load_fails_all_who_wait_and_the_next_tries_again(tmp_path: Path, server: FaultyServer) -> None:
    ann = served(server, tmp_path, "ann")
    server.faults.status[WEIGHTS] = 503
    async with rig(tmp_path) as the:
        results = await asyncio.gather(*(the.serve(ann) for _ in range(20)), return_exceptions=True)
        assert {type(result) for result in results} == {AdapterUnavailable}
        assert len({str(result) for result in results}) == 1
        assert str(results[0]) == "adapter 'ann' can't be used now: it can't be fetched from its source"  # no addresses
        assert server.requests.count(f"HEAD /ann/{WEIGHTS}") == 1
        assert the.memory.used == 0
        server.faults.status.clear()
        await the.serve(ann)
        assert the.is_unused(ann)


async def test_slow_sources_do_not_keep_others_waiting(tmp_path: Path, server: FaultyServer) -> None:
    """More than all threads of one place are taken by sources that send next to nothing."""
    slow = [served(server, tmp_path, f"slow{number}") for number in range(PER_PLACE + 2)]
    local = write(tmp_path / "local")
    server.faults.dribble = 0.02
    write(tmp_path / "elsewhere" / "fast")
    fast = AdapterRef("fast", adapter_digest(tmp_path / "elsewhere" / "fast"), "")
    with serve_folder(tmp_path / "elsewhere") as elsewhere:
        fast = dataclasses.replace(fast, source=f"{elsewhere.url}/fast")
        async with rig(tmp_path) as the:
            waiting = [asyncio.create_task(the.store.prefetch(adapter)) for adapter in slow]
            await until(lambda: sum("GET" in request for request in server.requests) >= PER_PLACE)
            await asyncio.wait_for(asyncio.gather(the.serve(local), the.serve(fast)), 5)
            assert not any(task.done() for task in waiting)
            await the.store.close()
            await asyncio.gather(*waiting, return_exceptions=True)


async def test_an_adapter_that_the_engine_refuses_takes_no_memory(tmp_path: Path) -> None:
    ann = write(tmp_path / "ann")
    async with rig(tmp_path) as the:
        the.engine.refused.add(ann.digest)
        with pytest.raises(AdapterUnavailable, match="the engine refuses it"):
            await the.serve(ann)
        assert (the.memory.used, tuple(the.store.states())) == (0, ())
        the.engine.refused.clear()
        await the.serve(ann)


async def test_a_waiter_that_is_cancelled_does_not_end_the_load(tmp_path: Path, server: FaultyServer) -> None:
    ann = served(server, tmp_path, "ann", 3_000_000)
    server.faults.stall = True
    async with rig(tmp_path, host_bytes=4_000_000, disk_bytes=9_000_000, source_timeout=0.5) as the:
        impatient = asyncio.create_task(the.serve(ann))
        patient = asyncio.create_task(the.serve(ann))
        await until(lambda: len(server.requests) > 0)
        impatient.cancel()
        with pytest.raises(asyncio.CancelledError):
            await impatient
        assert not patient.done()
        with pytest.raises(AdapterUnavailable, match="can't be fetched from its source"):
            await patient
        server.faults.stall = False
        before, earlier = len(server.requests), fetches(server, ann)
        only = asyncio.create_task(the.serve(ann))
        await until(lambda: len(server.requests) > before)
        only.cancel()  # the load goes on, for those who come next
        await the.serve(ann)
        assert fetches(server, ann) == earlier + 1


@pytest.mark.timeout(20)
async def test_what_goes_as_soon_as_it_is_there_comes_again(tmp_path: Path) -> None:
    """A request steps in between the end of its load and that one's callback, in the same turn of the loop."""
    ann, bob, cay, dan = (write(tmp_path / name) for name in ("ann", "bob", "cay", "dan"))
    async with rig(tmp_path, engine=SlowEngine) as the:
        assert isinstance(the.engine, SlowEngine)
        placed = the.engine.slow[ann.digest] = asyncio.Event()
        async with the.held(bob, cay):
            prefetch = asyncio.create_task(the.store.prefetch(ann))
            await until(lambda: ann.digest in the.engine.loaded)
            dans = asyncio.create_task(the.serve(dan))
            await until(lambda: the.disk.find(dan.digest) is not None)
            await asyncio.sleep(0.02)  # it waits for room
            placed.set()
            await asyncio.sleep(0)  # in the next turn ann has come, and gone
            await the.serve(ann)
            await asyncio.gather(prefetch, dans)
        assert the.engine.loaded.count(ann.digest) == 2


# Room in host memory


async def test_host_memory_keeps_the_most_recent_within_its_limit(tmp_path: Path) -> None:
    adapters = [write(tmp_path / str(number)) for number in range(5)]
    async with rig(tmp_path) as the:
        for adapter in adapters[:3]:
            await the.serve(adapter)
        full = the.store.totals()
        assert (full.host_adapters, full.host_bytes, full.host_bytes_total) == (3, the.memory.used, the.memory.capacity)
        assert full.host_evictions == 0
        await the.serve(adapters[0])  # a use
        for adapter in adapters[3:]:
            await the.serve(adapter)
            assert the.memory.used <= the.memory.capacity
        assert tuple(the.store.states()) == tuple(adapters[number].digest for number in (0, 3, 4))
        assert the.store.totals().host_evictions == 2
        assert the.tier(adapters[1]) is Tier.DISK
        for adapter in (*adapters, *reversed(adapters)):
            await the.serve(adapter)  # the engine finds the right bytes each time


async def test_room_is_counted_in_bytes(tmp_path: Path) -> None:
    small = [write(tmp_path / str(number)) for number in range(3)]
    large = write(tmp_path / "large", 2 * SIZE)
    async with rig(tmp_path) as the:
        for adapter in (*small, large):
            await the.serve(adapter)
        assert the.in_host() == {small[2].digest, large.digest}


async def test_what_is_in_use_stays(tmp_path: Path) -> None:
    ann, *others = (write(tmp_path / str(number)) for number in range(9))
    async with rig(tmp_path) as the:
        async with the.held(ann):
            for other in others:
                await the.serve(other)
                assert ann.digest in the.in_host()
            await the.step(ann)
            assert not the.is_unused(ann)
        for other in others[:3]:
            await the.serve(other)
        assert ann.digest not in the.in_host()
        assert the.is_unused(ann)


async def test_it_is_in_use_until_the_last_one_leaves(tmp_path: Path) -> None:
    ann, *others = (write(tmp_path / str(number)) for number in range(5))
    async with rig(tmp_path) as the, the.held(ann):
        async with the.held(ann):
            assert not the.is_unused(ann)
        for other in others:
            await the.serve(other)
        await the.step(ann)


async def test_what_is_pinned_stays_and_what_is_no_longer_may_go(tmp_path: Path) -> None:
    ann, *others = (write(tmp_path / str(number)) for number in range(5))
    async with rig(tmp_path) as the:
        the.store.pin([ann.digest])  # before it is there
        await the.store.prefetch(ann)
        for other in others:
            await the.serve(other)
        await the.serve(ann)
        assert dict(the.store.totals().loads) == {Tier.SOURCE: 5}
        assert set(the.disk.pinned) == {ann.digest}
        the.store.pin([others[0].digest])
        for other in others[1:]:
            await the.serve(other)
        assert ann.digest not in the.in_host()
        assert set(the.disk.pinned) == {others[0].digest}


async def in_the_way(the: Rig, tmp_path: Path) -> tuple[list[AdapterRef], AdapterRef]:
    """Five adapters fill the memory; the second and the fourth are pinned. And one that fits nowhere beside these."""
    adapters = [write(tmp_path / str(number)) for number in range(5)]
    for adapter in adapters:
        await the.serve(adapter)
    the.store.pin([adapters[1].digest, adapters[3].digest])
    return adapters, write(tmp_path / "large", SIZE + SIZE // 4)


async def test_what_is_pinned_is_not_in_the_way_for_good(tmp_path: Path) -> None:
    span = packed_span(Path(write(tmp_path / "measured").source))
    async with rig(tmp_path, host_bytes=5 * span) as the:
        adapters, large = await in_the_way(the, tmp_path)
        pinned = {adapters[1].digest, adapters[3].digest}
        await the.serve(large)
        await until(lambda: pinned < the.in_host())
        assert large.digest in the.in_host()
        assert [the.engine.loaded.count(digest) for digest in sorted(pinned)] in ([1, 2], [2, 1])
        for adapter in (*adapters, large, *adapters):
            await the.serve(adapter)
            await until(lambda: pinned < the.in_host())


async def test_what_is_pinned_and_in_use_stays_wherever_it_is(tmp_path: Path) -> None:
    span = packed_span(Path(write(tmp_path / "measured").source))
    async with rig(tmp_path, host_bytes=5 * span, room_timeout=0.05) as the:
        adapters, large = await in_the_way(the, tmp_path)
        async with the.held(adapters[1], adapters[3]):
            with pytest.raises(Unavailable, match="taken by others that are in use"):
                await the.serve(large)
        async with the.held(adapters[1]):
            await the.serve(large)
            await the.step(adapters[1])


async def test_what_is_pinned_comes_back_when_there_is_room_again(tmp_path: Path) -> None:
    span = packed_span(Path(write(tmp_path / "measured").source))
    async with rig(tmp_path, host_bytes=5 * span, room_timeout=0.05) as the:
        adapters, large = await in_the_way(the, tmp_path)
        async with the.held(adapters[0], adapters[4]):
            async with the.held(large):
                (gone,) = {adapters[1].digest, adapters[3].digest} - the.in_host()
                await asyncio.sleep(0.2)  # it has tried, and given up
                assert gone not in the.in_host()
            await until(lambda: gone in the.in_host())
        the.store.pin([])


async def test_who_closes_need_not_wait_for_what_is_pinned(tmp_path: Path) -> None:
    span = packed_span(Path(write(tmp_path / "measured").source))
    async with rig(tmp_path, host_bytes=5 * span, room_timeout=60) as the:
        adapters, large = await in_the_way(the, tmp_path)
        async with the.held(adapters[0], adapters[4], large):
            async with asyncio.timeout(2):
                await the.store.close()
            assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_loads_that_wait_for_room_hold_no_files_open(tmp_path: Path) -> None:
    adapters = [write(tmp_path / str(number)) for number in range(30)]
    async with rig(tmp_path) as the:

        def open_files() -> int:
            count = 0
            for descriptor in os.listdir("/proc/self/fd"):
                with contextlib.suppress(OSError):  # what listed them
                    count += os.readlink(f"/proc/self/fd/{descriptor}").startswith(f"{the.disk.root}/")
            return count

        async with the.held(*adapters[:THREE]):
            waiting = [asyncio.create_task(the.serve(adapter)) for adapter in adapters]
            await until(lambda: all((the.disk.root / adapter.digest).is_dir() for adapter in adapters))
            await until(lambda: open_files() == 0)
        await asyncio.gather(*waiting)


async def test_a_copy_that_leaves_the_disk_while_its_load_waits_is_fetched_again(
    tmp_path: Path, server: FaultyServer
) -> None:
    ann = served(server, tmp_path, "ann")
    others = [write(tmp_path / str(number)) for number in range(THREE)]
    async with rig(tmp_path) as the:
        async with the.held(*others):
            waiting = asyncio.create_task(the.serve(ann))
            await until(lambda: the.disk.find(ann.digest) is not None)
            await asyncio.sleep(0.02)
            the.disk.discard(ann.digest)
        await waiting
        assert fetches(server, ann) == 2


async def test_a_load_waits_until_one_of_the_used_is_free(tmp_path: Path) -> None:
    adapters = [write(tmp_path / str(number)) for number in range(4)]
    async with rig(tmp_path) as the, the.held(adapters[0], adapters[1]):
        async with the.held(adapters[2]):
            waiting = asyncio.create_task(the.serve(adapters[3]))
            await until(lambda: the.disk.find(adapters[3].digest) is not None)
            await asyncio.sleep(0.02)
            assert not waiting.done()
        await waiting
        assert the.in_host() == {adapters[number].digest for number in (0, 1, 3)}


async def test_a_load_gives_up_waiting_for_room(tmp_path: Path) -> None:
    adapters = [write(tmp_path / str(number)) for number in range(4)]
    async with rig(tmp_path, room_timeout=0.02) as the:
        async with the.held(*adapters[:3]):
            with pytest.raises(Unavailable, match="the host memory for adapters is taken by others that are in use"):
                await the.serve(adapters[3])
        await the.serve(adapters[3])


async def test_what_never_fits_is_refused_at_once(tmp_path: Path) -> None:
    async with rig(tmp_path) as the:
        with pytest.raises(AdapterUnavailable, match=r"has 4000 bytes, more than store\.host_bytes can hold"):
            await the.serve(write(tmp_path / "large", 4 * SIZE))
        assert the.memory.used == 0


async def test_a_few_adapters_in_little_memory_under_many_requests(tmp_path: Path) -> None:
    """Everything at once; the engine looks at the bytes in each request."""
    adapters = [write(tmp_path / str(number), 500 + 90 * number) for number in range(8)]
    async with rig(tmp_path, disk_bytes=6000) as the:

        async def client(seed: int) -> None:
            chosen = random.Random(seed)
            for _ in range(20):
                request = asyncio.create_task(the.serve(chosen.choice(adapters)))
                if chosen.random() < 0.2:
                    await asyncio.sleep(chosen.random() / 100)
                    request.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await request

        await asyncio.gather(*(client(seed) for seed in range(8)))
        await until(lambda: all(map(the.is_unused, adapters)))
        load = the.store.totals()
        assert load.host_evictions > 0
        assert load.disk_evictions > 0
        assert load.host_bytes <= load.host_bytes_total
        assert load.slots_used <= 2
        assert the.memory.regions == load.host_adapters


# Requests that end early


@pytest.mark.parametrize("failure", [asyncio.CancelledError(), EngineFailed("the engine gave up")])
async def test_a_request_that_ends_early_keeps_its_adapter_until_the_engine_is_done(
    tmp_path: Path, failure: BaseException
) -> None:
    ann, *others = (write(tmp_path / str(number)) for number in range(9))
    async with rig(tmp_path, engine=HesitantEngine) as the:
        assert isinstance(the.engine, HesitantEngine)

        async def end_early() -> None:
            async with the.store.using(ann):
                raise failure

        with pytest.raises(type(failure)):
            await end_early()
        await until(lambda: the.engine.asked == 1)  # type: ignore[attr-defined]
        for other in others:
            await the.serve(other)
        the.store.forget([ann.digest])
        await the.step(ann)  # as the engine's next step may
        assert not the.is_unused(ann)
        the.engine.settled.set()
        await until(lambda: the.is_unused(ann))
        for other in others[:3]:
            await the.serve(other)
        assert ann.digest not in the.in_host()


async def test_an_engine_that_is_gone_keeps_nothing(tmp_path: Path) -> None:
    ann = write(tmp_path / "ann")
    async with rig(tmp_path, engine=LostEngine) as the:
        with pytest.raises(EngineFailed):
            async with the.store.using(ann):
                raise EngineFailed("the engine gave up")
        await until(lambda: the.is_unused(ann))


# Copies that are damaged or gone


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.chmod(0o644)
    path.write_bytes(content)


def cut(path: Path) -> None:
    os.truncate(path, 10)


DAMAGES = pytest.mark.parametrize("damage", [flip_a_bit, cut, Path.unlink])


@DAMAGES
@pytest.mark.parametrize("name", LORA_FILES)
async def test_a_damaged_copy_is_fetched_again(
    tmp_path: Path, server: FaultyServer, damage: Callable[[Path], None], name: str
) -> None:
    ann = served(server, tmp_path, "ann")
    (tmp_path / "served" / "ann" / CONFIG).write_bytes(b'{"long": "enough"}')
    ann = AdapterRef("ann", adapter_digest(tmp_path / "served" / "ann"), ann.source)
    async with rig(tmp_path) as the:
        await the.serve(ann)
        the.store.forget([ann.digest])
        damage(the.disk.root / ann.digest / name)
        await the.serve(ann)
        assert fetches(server, ann) == 2
        assert adapter_digest(the.disk.root / ann.digest) == ann.digest
        assert dict(the.store.totals().loads) == {Tier.SOURCE: 2}
        assert the.memory.regions == 1


@DAMAGES
async def test_a_damaged_copy_without_its_source_is_an_error(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    ann = write(tmp_path / "ann")
    async with rig(tmp_path) as the:
        await the.serve(ann)
        the.store.forget([ann.digest])
        damage(the.disk.root / ann.digest / WEIGHTS)
        shutil.rmtree(tmp_path / "ann")
        for _ in range(2):
            with pytest.raises(AdapterUnavailable, match="its source is gone"):
                await the.serve(ann)
        assert the.engine.loaded == [ann.digest]
        assert (the.memory.used, the.tier(ann)) == (0, Tier.SOURCE)


async def test_a_source_that_has_changed_is_refused(tmp_path: Path) -> None:
    ann = write(tmp_path / "ann")
    write(tmp_path / "ann", seed="another")
    async with rig(tmp_path) as the:
        with pytest.raises(
            AdapterUnavailable, match="its source no longer holds the version that was added: add the adapter"
        ):
            await the.serve(ann)
        assert the.memory.used == 0


async def test_what_was_evicted_from_the_disk_comes_from_its_source(tmp_path: Path, server: FaultyServer) -> None:
    adapters = [served(server, tmp_path, str(number)) for number in range(4)]
    async with rig(tmp_path, disk_bytes=2 * SIZE) as the:
        for adapter in adapters:
            await the.serve(adapter)
        assert the.tier(adapters[0]) is Tier.SOURCE
        await the.serve(adapters[0])
        assert fetches(server, adapters[0]) == 2
        load = the.store.totals()
        assert (load.disk_evictions, load.disk_bytes) == (3, 2 * SIZE)


async def test_host_memory_serves_what_is_neither_on_disk_nor_at_its_source(tmp_path: Path) -> None:
    ann = write(tmp_path / "ann")
    async with rig(tmp_path) as the:
        await the.serve(ann)
        the.disk.discard(ann.digest)
        shutil.rmtree(tmp_path / "ann")
        await the.serve(ann)


async def test_a_disk_that_fails_is_unavailable(tmp_path: Path) -> None:
    async with rig(tmp_path) as the:
        shutil.rmtree(the.disk.root)
        the.disk.root.write_text("no folder")
        with pytest.raises(Unavailable, match="adapters can't be read from the server's disk"):
            await the.serve(write(tmp_path / "ann"))


# What leaves the catalog, and what is told


async def test_what_is_forgotten_leaves_memory_once_it_is_unused(tmp_path: Path) -> None:
    ann, bob = (write(tmp_path / str(number)) for number in range(2))
    async with rig(tmp_path) as the:
        await the.serve(ann)
        async with the.held(bob):
            the.store.forget([ann.digest, bob.digest, "0" * 64])
            assert the.in_host() == {bob.digest}
            await the.step(bob)
            assert the.memory.regions == 1
        assert the.in_host() == set()
        assert the.memory.regions == 0
        await the.serve(bob)  # a name points to it again
        assert the.in_host() == {bob.digest}


async def test_where_an_adapter_is_and_who_uses_it(tmp_path: Path) -> None:
    ann, bob, cay = (write(tmp_path / name) for name in ("ann", "bob", "cay"))
    async with rig(tmp_path, slots=2) as the:
        assert the.tier(ann) is Tier.SOURCE
        await the.serve(ann)
        async with the.held(bob, cay):
            assert the.tier(bob) is Tier.SLOT
            assert the.tier(ann) is Tier.HOST  # two slots, two more recent ones
            assert not the.is_unused(bob)
        await the.serve(ann)
        assert the.tier(bob) is Tier.HOST
        assert tuple(the.store.states()) == (bob.digest, cay.digest, ann.digest)


# The end


async def test_closing_ends_loads_and_leaves_no_thread_or_task(tmp_path: Path, server: FaultyServer) -> None:
    tasks_before, threads_before = asyncio.all_tasks(), set(threading.enumerate())
    ann, bob = (served(server, tmp_path, name) for name in ("ann", "bob"))
    local = [write(tmp_path / str(number)) for number in range(4)]
    with ExitStack() as faults:
        server.faults.stall_after = 500
        faults.callback(setattr, server.faults, "stall_after", None)
        async with rig(tmp_path, source_timeout=0.3) as the:
            loads = [asyncio.create_task(the.store.prefetch(adapter)) for adapter in (ann, bob, ann)]
            async with the.held(*local[:3]):
                loads += [asyncio.create_task(the.serve(adapter)) for adapter in (local[3], ann)]
                await until(lambda: fetches(server, ann) == fetches(server, bob) == 1)
                await until(lambda: the.disk.find(local[3].digest) is not None)
                async with asyncio.timeout(2):
                    await the.store.close()
                results = await asyncio.wait_for(asyncio.gather(*loads, return_exceptions=True), 2)
                assert all(isinstance(result, (asyncio.CancelledError, PreftError)) for result in results)
        await until(lambda: asyncio.all_tasks() == tasks_before)
        adapter_threads = {
            thread for thread in set(threading.enumerate()) - threads_before if "adapter-" in thread.name
        }
        await until(lambda: not any(thread.is_alive() for thread in adapter_threads))
        assert the.disk.used() == sum(SIZE for _ in local)


async def test_closing_while_an_engine_has_not_answered(tmp_path: Path, server: FaultyServer) -> None:
    ann, bob = write(tmp_path / "ann"), served(server, tmp_path, "bob")
    server.faults.stall = True
    async with rig(tmp_path, engine=HesitantEngine, source_timeout=0.3) as the:
        with pytest.raises(EngineFailed):
            async with the.store.using(ann):
                raise EngineFailed("the engine gave up")
        waiting = asyncio.create_task(the.serve(bob))
        await until(lambda: len(server.requests) > 0)
        async with asyncio.timeout(2):
            await the.store.close()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert asyncio.all_tasks() == {asyncio.current_task()}
