"""The status stream over real gRPC: the whole first, then each change and signs of life, at most one per interval."""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, cast

import grpc
import grpc.aio
import pytest

from preft.adapters.store.adapter_store import AdapterStore
from preft.core.cluster import AdapterState, AdapterStatus, Role, TierTotals, WorkerStatus
from preft.core.errors import InvalidRequest
from preft.memory.arena import StagingArena
from preft.rpc import workers_pb2, workers_pb2_grpc
from preft.rpc.secret import CALLER_KEY, ClusterChannel
from preft.rpc.status import error_from_rpc
from preft.worker import status as status_module
from preft.worker.status import StatusService
from preft.worker.usage import Usage
from support.adapter_tiers import adapter_store
from support.fake_engine import FakeEngine
from support.status_watcher import SECRET, Watcher, watching
from support.worker_services import until, write_adapter


@cache
def digest(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()


class FakeAdapters:
    """An AdapterStore's state without its memory. Counts the looks at all adapters."""

    def __init__(self) -> None:
        self.held: dict[str, AdapterState] = {}
        self.wanted: Counter[str] = Counter()
        self.looks = 0
        self.on_change: Callable[[str], None] = lambda digest: None

    def observe(self, on_change: Callable[[str], None]) -> None:
        self.on_change = on_change

    def state(self, digest: str) -> AdapterState | None:
        return self.held.get(digest)

    def states(self) -> dict[str, AdapterState]:
        self.looks += 1
        return dict(self.held)

    def totals(self) -> TierTotals:
        return TierTotals(host_adapters=len(self.held))

    def want(self, digests: Collection[str]) -> None:
        self.wanted.update(digests)

    def unwant(self, digests: Collection[str]) -> None:
        self.wanted.subtract(digests)

    def put(self, digest: str, state: AdapterState | None) -> None:
        if state is None:
            del self.held[digest]
        else:
            self.held[digest] = state
        self.on_change(digest)


class Rig:
    """A served StatusService. `own` is the worker's own measurement."""

    def __init__(self) -> None:
        self.own = WorkerStatus()
        self.measured = 0
        self.usage = Usage(4)
        self.adapters = FakeAdapters()
        self.service = StatusService(self._measure, self.usage, cast(AdapterStore, self.adapters))
        self.address = ""
        self._opened = AsyncExitStack()

    async def start(self) -> None:
        server = grpc.aio.server()
        workers_pb2_grpc.add_WorkerStatusServicer_to_server(self.service, server)
        self.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        await server.start()
        self._opened.push_async_callback(server.stop, None)

    async def watch(self, caller: str, interval: float = 0.02) -> Watcher:
        """A watcher until the end of the test that has read the first message."""
        watcher, _ = await self._opened.enter_async_context(watching(self.address, caller, SECRET, interval=interval))
        await watcher.until(lambda: bool(watcher.updates))
        return watcher

    async def close(self) -> None:
        await self._opened.aclose()

    def _measure(self) -> WorkerStatus:
        self.measured += 1
        return replace(self.own, running=self.usage.running, tiers=self.adapters.totals())


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    rig = Rig()
    await rig.start()
    yield rig
    await rig.close()
    await until(lambda: not rig.service._watchers)


async def test_the_whole_comes_first_and_then_what_changed(rig: Rig) -> None:
    for number in range(3):
        rig.adapters.put(digest(number), AdapterState.HOST)
    rig.own = WorkerStatus(kv_blocks_used=5, staging_bytes_fit=7, preemptions=1)
    one = await rig.watch("one")
    assert [update.is_whole for update in one.updates] == [True]
    assert one.adapters == {digest(number): AdapterStatus(AdapterState.HOST) for number in range(3)}
    assert one.status == replace(rig.own, tiers=TierTotals(host_adapters=3))
    rig.adapters.put(digest(0), AdapterState.SLOT)
    rig.adapters.put(digest(1), None)
    rig.adapters.put(digest(9), AdapterState.LOADING)
    await one.until(lambda: len(one.updates) == 2)
    assert not one.updates[1].is_whole
    assert one.updates[1].adapters == {
        digest(0): AdapterStatus(AdapterState.SLOT),
        digest(1): AdapterStatus(None),
        digest(9): AdapterStatus(AdapterState.LOADING),
    }
    rig.own = replace(rig.own, kv_blocks_used=6)
    await one.until(lambda: len(one.updates) == 3)
    assert one.updates[2].adapters == {}
    assert one.status.kv_blocks_used == 6
    assert rig.adapters.looks == 1


async def test_what_changed_twice_within_the_interval_is_one_message(rig: Rig) -> None:
    one = await rig.watch("one", interval=0.3)
    for number in range(50):
        rig.adapters.put(digest(number % 5), AdapterState.HOST if number < 45 else AdapterState.SLOT)
        await asyncio.sleep(0)
    await one.until(lambda: len(one.updates) == 2)
    assert one.updates[1].adapters == {digest(number): AdapterStatus(AdapterState.SLOT) for number in range(5)}


@pytest.mark.parametrize(("adapters_change", "most"), [(False, 8), (True, 36)])
async def test_messages_per_interval(rig: Rig, adapters_change: bool, most: int) -> None:
    """One, but up to five if adapters change."""
    loop = asyncio.get_running_loop()
    one = await rig.watch("one", interval=0.1)
    began, number = loop.time(), 0
    while loop.time() < began + 0.65:
        number += 1
        rig.own = replace(rig.own, preemptions=number)
        if adapters_change:
            rig.adapters.put(digest(number), AdapterState.HOST)
        await asyncio.sleep(0.005)
    assert 2 <= len(one.updates) <= most


async def test_news_of_adapters_comes_before_the_interval_ends(rig: Rig) -> None:
    one = await rig.watch("one", interval=10)
    began = asyncio.get_running_loop().time()
    rig.adapters.put(digest(1), AdapterState.HOST)
    await one.until(lambda: len(one.updates) == 2)
    assert 1.5 < asyncio.get_running_loop().time() - began < 8


async def test_a_sign_of_life_comes_each_second_and_says_nothing(rig: Rig) -> None:
    loop = asyncio.get_running_loop()
    one = await rig.watch("one", interval=0.4)
    began = loop.time()
    await one.until(lambda: len(one.updates) == 3)
    assert 1.9 < loop.time() - began < 4
    assert one.updates[1] == one.updates[2] == replace(one.updates[0], adapters={}, is_whole=False)


async def test_other_counts_leave_out_the_caller_s_own(rig: Rig) -> None:
    one, two = await rig.watch("one"), await rig.watch("two")
    own = AdapterStatus(AdapterState.HOST)
    rig.adapters.put(digest(1), AdapterState.HOST)
    await one.until(lambda: one.knows(digest(1)) == own)
    with (
        rig.usage.prompt("one", digest(1), 9),
        rig.usage.prompt("one", digest(1), 9),
        rig.usage.prompt("two", digest(2), 9),
        rig.usage.prefill("one"),
        rig.usage.sequence("two"),
    ):
        await two.until(lambda: two.knows(digest(1)).other_prompts == two.status.other_prompts == 2)
        await one.until(lambda: one.knows(digest(2)) == AdapterStatus(None, 1) and one.status.other_sequences == 1)
        for watcher in (one, two):  # streams share a measurement for a moment
            await watcher.until(lambda watcher=watcher: watcher.status.running == 2)
        assert (one.status.other_prompts, one.status.other_prompt_tokens) == (1, 9)
        assert (two.status.other_prompt_tokens, two.status.other_sequences) == (18, 0)
        assert one.knows(digest(1)) == own
        assert two.knows(digest(2)) == AdapterStatus(None)
        late = await rig.watch("three")
        assert late.adapters == {digest(1): replace(own, other_prompts=2), digest(2): AdapterStatus(None, 1)}
    await two.until(lambda: two.knows(digest(1)) == own and two.status.other_prompts == 0)
    await one.until(lambda: one.knows(digest(2)) == AdapterStatus(None) and one.status.other_sequences == 0)
    assert not any(digest(1) in update.adapters and update.adapters[digest(1)] != own for update in one.updates)


async def test_a_caller_s_own_prompts_are_no_news_for_it(rig: Rig) -> None:
    one = await rig.watch("one", interval=0.1)
    with rig.usage.prompt("one", digest(1), 9):
        await asyncio.sleep(0.25)
    await asyncio.sleep(0.15)
    assert len(one.updates) == 1


async def test_draining_is_told_at_once(rig: Rig) -> None:
    slow, fast = await rig.watch("slow", interval=10.0), await rig.watch("fast")
    rig.service.drain()
    async with asyncio.timeout(5):
        await rig.service.drained(60.0)
    await slow.until(lambda: slow.status.draining)
    await fast.until(lambda: fast.status.draining)
    count = len(fast.updates)
    await asyncio.sleep(0.3)
    assert len(fast.updates) <= count + 1  # it doesn't spin
    assert (await rig.watch("late")).status.draining


async def test_one_watcher_may_be_told_of_the_drain_later(rig: Rig) -> None:
    own, other = await rig.watch("own"), await rig.watch("other")
    rig.service.drain(but="own")
    await other.until(lambda: other.status.draining)
    count = len(own.updates)
    await asyncio.sleep(0.3)
    assert not own.status.draining
    assert len(own.updates) <= count + 1  # it doesn't spin
    rig.service.drain()
    async with asyncio.timeout(5):
        await rig.service.drained(60.0)
    await own.until(lambda: own.status.draining)


async def test_a_worker_does_not_wait_for_ever_for_a_watcher_that_does_not_read(rig: Rig) -> None:
    rig.service._watchers.add(stuck := status_module._Watcher("stuck"))
    rig.service.drain()
    async with asyncio.timeout(5):
        await rig.service.drained(0.05)
    rig.service._watchers.remove(stuck)


@pytest.mark.parametrize("interval", [0.0, 0.009, 10.1, -1.0, float("nan"), float("inf")])
async def test_an_impossible_interval_is_refused(rig: Rig, interval: float) -> None:
    async with grpc.aio.insecure_channel(rig.address) as channel:
        call = workers_pb2_grpc.WorkerStatusStub(channel).Watch([workers_pb2.WatchRequest(interval=interval)])
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call.read()
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    error = error_from_rpc(refused.value, "w")
    assert isinstance(error, InvalidRequest)
    assert error.param == "interval"


async def test_callers_without_a_name_share_one(rig: Rig) -> None:
    async with grpc.aio.insecure_channel(rig.address) as channel:
        stub, request = workers_pb2_grpc.WorkerStatusStub(channel), workers_pb2.WatchRequest(interval=0.02)
        with rig.usage.prompt("", "", 9), rig.usage.prompt("one", "", 9):
            assert (await stub.Watch([request]).read()).other_prompts == 1
        call = stub.Watch([request], metadata=((CALLER_KEY, "x" * 300),))
        with pytest.raises(grpc.aio.AioRpcError, match="caller is at most 256 characters"):
            await call.read()


async def test_a_stream_ends_with_its_client(rig: Rig) -> None:
    async with watching(rig.address, "one") as (one, _):
        await one.until(lambda: bool(one.updates))
        assert len(rig.service._watchers) == 1
    await until(lambda: not rig.service._watchers)


async def test_callers_tell_which_adapters_they_want(rig: Rig) -> None:
    async with grpc.aio.insecure_channel(rig.address) as channel:
        one, two = (workers_pb2_grpc.WorkerStatusStub(channel).Watch() for _ in range(2))
        await one.write(workers_pb2.WatchRequest(interval=0.02, wanted=[digest(0), digest(1)]))
        await two.write(workers_pb2.WatchRequest(interval=0.02, wanted=[digest(1)]))
        await until(lambda: +rig.adapters.wanted == {digest(0): 1, digest(1): 2})
        await one.write(workers_pb2.WatchRequest(wanted=[digest(1), digest(2)], unwanted=[digest(0), digest(9)]))
        await until(lambda: +rig.adapters.wanted == {digest(1): 2, digest(2): 1})
        one.cancel()
        await until(lambda: +rig.adapters.wanted == {digest(1): 1})
        await two.done_writing()
        await asyncio.sleep(0.05)
        assert +rig.adapters.wanted == {digest(1): 1}
        two.cancel()
        await until(lambda: not +rig.adapters.wanted)


async def test_others_are_told_for_how_long_a_caller_waits_for_a_slot(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(status_module, "WAIT_VALID", 1.0)
    one = await rig.watch("one")
    async with ClusterChannel(rig.address, SECRET, caller="two") as channel:
        two = workers_pb2_grpc.WorkerStatusStub(channel).Watch()
        await two.write(workers_pb2.WatchRequest(interval=0.02, slot_wait_ms=5000))
        await one.until(lambda: 5000 <= one.status.other_slot_wait_ms < 10_000)
        assert (await two.read()).other_slot_wait_ms == 0  # its own
        await two.write(workers_pb2.WatchRequest())
        await one.until(lambda: one.status.other_slot_wait_ms == 0)
        await two.write(workers_pb2.WatchRequest(slot_wait_ms=2**32 - 1))
        await one.until(lambda: one.status.other_slot_wait_ms == status_module.MOST_WAIT_MS)
        await one.until(lambda: one.status.other_slot_wait_ms == 0)  # it has said nothing since, and may hang
        await two.write(workers_pb2.WatchRequest(slot_wait_ms=7))
        await one.until(lambda: one.status.other_slot_wait_ms > 0)
        two.cancel()
        await one.until(lambda: one.status.other_slot_wait_ms == 0)


async def end_of(call: grpc.aio.StreamStreamCall[workers_pb2.WatchRequest, workers_pb2.StatusUpdate]) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass


@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize("wanted", [["../x"], [digest(number) for number in range(11)]], ids=["no digest", "too many"])
async def test_impossible_wants_end_the_stream(
    rig: Rig, wanted: list[str], is_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(status_module, "MOST_ADAPTERS", 10)
    async with grpc.aio.insecure_channel(rig.address) as channel:
        call = workers_pb2_grpc.WorkerStatusStub(channel).Watch()
        if not is_first:
            await call.write(workers_pb2.WatchRequest(interval=0.02, wanted=[digest(5)]))
        await call.write(workers_pb2.WatchRequest(interval=0.02, wanted=wanted))
        with pytest.raises(grpc.aio.AioRpcError, match="wanted") as refused:
            await end_of(call)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    await until(lambda: not rig.service._watchers and not +rig.adapters.wanted)


async def test_many_watchers_of_many_adapters_cost_what_changes(rig: Rig) -> None:
    """Eight routers of a worker with 10,000 adapters: nobody looks at all of them again."""
    for number in range(10_000):
        rig.adapters.held[digest(number)] = AdapterState.HOST
    watchers = [await rig.watch(str(number)) for number in range(8)]
    assert all(len(watcher.adapters) == 10_000 for watcher in watchers)
    for number in range(0, 10_000, 1000):
        rig.adapters.put(digest(number), AdapterState.SLOT)
        await asyncio.sleep(0.01)
    for watcher in watchers:
        await watcher.until(lambda w=watcher: w.knows(digest(9000)).state is AdapterState.SLOT)
        assert sum(len(update.adapters) for update in watcher.updates[1:]) == 10
    assert rig.adapters.looks == 8


async def test_many_watchers_share_a_measurement(rig: Rig) -> None:
    loop = asyncio.get_running_loop()
    watchers = [await rig.watch(str(number), interval=0.02) for number in range(8)]
    began, before = loop.time(), rig.measured
    await asyncio.sleep(0.5)
    assert rig.measured - before <= (loop.time() - began) / status_module.MEASURE_SECONDS + 1
    rig.own = replace(rig.own, preemptions=1)
    for watcher in watchers:
        await watcher.until(lambda w=watcher: w.status.preemptions == 1)


async def test_more_adapters_than_one_message_holds(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status_module, "MOST_ADAPTERS", 100)
    for number in range(250):
        rig.adapters.held[digest(number)] = AdapterState.HOST
    one = await rig.watch("one")
    await one.until(lambda: len(one.adapters) == 250)
    assert [len(update.adapters) for update in one.updates[:3]] == [100, 100, 50]
    assert [update.is_whole for update in one.updates[:3]] == [True, False, False]
    rig.adapters.put(digest(0), None)
    await one.until(lambda: one.knows(digest(0)) == AdapterStatus(None))
    assert rig.adapters.looks == 1


async def test_a_watcher_that_does_not_read_costs_no_memory_and_gets_the_whole_later(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its stream stands still between two messages, while adapters come and go."""
    monkeypatch.setattr(status_module, "MOST_ADAPTERS", 100)
    messages = rig.service._messages(watcher := status_module._Watcher("stuck"), 0.01)
    rig.service._watchers.add(watcher)
    assert (await anext(messages)).whole
    for number in range(20_000):
        rig.adapters.put(digest(number), AdapterState.HOST)
        if number >= 10:
            rig.adapters.put(digest(number - 10), None)
    assert len(watcher.changed) <= 101
    message = await anext(messages)
    assert message.whole
    assert {one.digest.hex() for one in message.adapters} == {digest(number) for number in range(19_990, 20_000)}
    rig.adapters.put(digest(5), AdapterState.SLOT)
    assert [one.digest.hex() for one in (await anext(messages)).adapters] == [digest(5)]
    await messages.aclose()
    rig.service._watchers.remove(watcher)


async def test_a_client_that_reads_nothing_gets_no_pile_of_messages(rig: Rig) -> None:
    """The service stands still once some megabytes are on their way."""
    async with grpc.aio.insecure_channel(rig.address) as channel:
        call = workers_pb2_grpc.WorkerStatusStub(channel).Watch([workers_pb2.WatchRequest(interval=0.01)])
        await call.read()
        measured = []
        for number in range(80):
            for one in range(5000):
                rig.adapters.put(digest(one), AdapterState.SLOT if number % 2 else AdapterState.HOST)
            await asyncio.sleep(0.02)
            measured.append(rig.measured)
            if number > 20 and measured[-10] == rig.measured:
                break
        else:
            raise AssertionError("it still writes")
        call.cancel()
    await until(lambda: not rig.service._watchers)


@asynccontextmanager
async def real_adapters(engine_type: type[FakeEngine] = FakeEngine) -> AsyncIterator[tuple[AdapterStore, Any]]:
    memory, kv = StagingArena.create(1 << 16), StagingArena.create(4096)
    engine = engine_type(Role.PREFILL, kv.path, memory.path)
    try:
        async with adapter_store(engine, memory, slots=1) as adapters:
            yield adapters, memory
    finally:
        await engine.close()
        memory.close()
        kv.close()


async def test_an_adapter_store_tells_each_change_of_state(tmp_path: Path) -> None:
    ann, bob = (write_adapter(tmp_path / name, name) for name in ("ann", "bob"))
    gone = replace(ann, digest="d" * 64, source=str(tmp_path / "gone"))
    names = {ann.digest: "ann", bob.digest: "bob", gone.digest: "gone"}
    told: list[tuple[str, AdapterState | None]] = []
    async with real_adapters() as (adapters, _):
        adapters.observe(lambda digest: told.append((names[digest], adapters.state(digest))))
        await adapters.prefetch(ann)
        await asyncio.sleep(0)
        assert told[:2] == [("ann", AdapterState.LOADING), ("ann", AdapterState.HOST)]
        assert adapters.states() == {ann.digest: AdapterState.HOST}
        told.clear()
        for adapter in (ann, ann, bob):
            async with adapters.using(adapter):
                pass
        assert [*dict.fromkeys(told)] == [
            ("ann", AdapterState.SLOT),
            ("bob", AdapterState.LOADING),
            ("bob", AdapterState.HOST),
            ("bob", AdapterState.SLOT),
            ("ann", AdapterState.HOST),
        ]
        told.clear()
        adapters.forget([ann.digest])
        assert told == [("ann", None)]
        assert adapters.states() == {bob.digest: AdapterState.SLOT}
        told.clear()
        with pytest.raises(Exception, match="gone"):
            await adapters.prefetch(gone)
        await asyncio.sleep(0)
        assert told == [("gone", AdapterState.LOADING), ("gone", None)]
