"""Whole workers but for the model: registration, health, what they report, and KV between two of them over gRPC."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import uuid
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from preft.core.cluster import AdapterState, AdapterStatus, Role, TierTotals, Worker
from preft.core.errors import EngineFailed, TransferFailed, Unavailable, WorkerLost
from preft.core.ports import StateStore
from preft.core.request import AdapterRef, Sampling
from preft.core.settings import MiB, Settings
from preft.memory.errors import NoRoom
from preft.router.decode_stream import DecodeStream
from preft.rpc import workers_pb2, workers_pb2_grpc
from preft.rpc.convert import adapter_to_proto, sampling_to_proto
from preft.rpc.secret import ClusterChannel
from preft.worker.server import LIFETIME, STARTING_LIFETIME, WorkerServer
from support.fake_engine import FakeEngine, tokens_of
from support.fakes import FakeStore
from support.lora_folders import write_base
from support.status_watcher import watching
from support.worker_servers import SECRET, StartFake, settings_for, start
from support.worker_services import broken, code_of, rest, until, write_adapter

PROMPT = (5, 6, 7, 8, 9)
GREEDY = Sampling(max_tokens=8, temperature=0.0)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return settings_for(tmp_path)


@pytest.fixture
def store() -> FakeStore:
    return FakeStore()


@pytest.fixture
def start_engine() -> StartFake:
    return StartFake()


class Cluster:
    """One worker of each role."""

    def __init__(self, prefill: WorkerServer, decode: WorkerServer, engines: dict[Role, FakeEngine]) -> None:
        self.prefill, self.decode = prefill, decode
        self.engines = engines

    def idle(self) -> bool:
        statuses = (self.prefill.status(), self.decode.status())
        return all(
            (status.running, status.kv_blocks_used, status.staging_bytes_used, status.open_handles) == (0, 0, 0, 0)
            for status in statuses
        )

    async def first_tokens(
        self, prompt: tuple[int, ...], sampling: Sampling, adapter: AdapterRef | None, n: int, handle: str
    ) -> list[int]:
        async with channel(self.prefill) as to_prefill:
            call = workers_pb2_grpc.PrefillWorkerStub(to_prefill).Prefill(
                workers_pb2.PrefillRequest(
                    request_id="r",
                    prompt_token_ids=prompt,
                    sampling=sampling_to_proto(sampling),
                    adapter=adapter_to_proto(adapter) if adapter else None,
                    n=n,
                    target=workers_pb2.KvTarget(address=self.decode.record.address, handle=handle),
                )
            )
            events = [event async for event in call]
        assert events[1].HasField("kv_pushed")
        return [choice.token_ids[0] for choice in events[0].first_tokens.choices]

    async def generate(self, sampling: Sampling, adapter: AdapterRef | None = None, n: int = 1) -> list[list[int]]:
        """As the router does it: every choice's tokens."""
        handle, digest = uuid.uuid4().hex, adapter.digest if adapter else ""
        firsts = await self.first_tokens(PROMPT, sampling, adapter, n, handle)
        async with decode_stream(self.decode) as stream:
            others = await asyncio.gather(
                *(
                    rest(*stream.start(decode_request(sampling, first, digest, handle, index), 20))
                    for index, first in enumerate(firsts)
                )
            )
        return [[first, *tokens] for first, tokens in zip(firsts, others, strict=True)]


def channel(worker: WorkerServer, caller: str = "") -> ClusterChannel:
    return ClusterChannel(worker.record.address, SECRET, caller=caller)


@asynccontextmanager
async def decode_stream(worker: WorkerServer) -> AsyncIterator[DecodeStream]:
    async with channel(worker) as to_decode:
        stream = DecodeStream(workers_pb2_grpc.DecodeWorkerStub(to_decode), worker.record.id, lambda: None)
        yield stream
        await stream.close()


def decode_request(
    sampling: Sampling, first: int, digest: str, handle: str, index: int = 0
) -> workers_pb2.DecodeRequest:
    return workers_pb2.DecodeRequest(
        request_id="r",
        handle=handle,
        prompt_token_ids=PROMPT,
        sampling=sampling_to_proto(sampling),
        adapter_digest=digest,
        kv_timeout=20,
        choices=[workers_pb2.DecodeChoice(index=index, output_token_ids=[first])],
    )


@pytest.fixture
async def cluster(settings: Settings, store: FakeStore, start_engine: StartFake) -> AsyncIterator[Cluster]:
    async with AsyncExitStack() as stack:
        workers = {}
        for role in Role:
            workers[role] = await start(role, settings, store, start_engine)
            stack.push_async_callback(workers[role].close)
        cluster = Cluster(workers[Role.PREFILL], workers[Role.DECODE], start_engine.engines)
        yield cluster
        await until(cluster.idle)


async def registered(store: StateStore) -> Worker:
    (worker,) = await store.workers()
    return worker


@pytest.mark.parametrize("role", Role)
async def test_registers_before_and_after_the_engine_starts(
    settings: Settings, store: FakeStore, start_engine: StartFake, role: Role
) -> None:
    start_engine.hold.clear()
    starting = asyncio.create_task(start(role, settings, store, start_engine, "c-1"))
    await until(lambda: bool(start_engine.arenas))
    record = await registered(store)
    assert (record.id, record.role, record.address, record.pid) == ("c-1", role, "", os.getpid())
    start_engine.hold.set()
    worker = await starting
    record = await registered(store)
    assert record == worker.record
    assert [lifetime for _, lifetime in store.renewals] == [STARTING_LIFETIME, LIFETIME] == [600.0, 30.0]
    assert (record.id, record.role, record.pid) == ("c-1", role, os.getpid())
    assert record.address.startswith("127.0.0.1:")
    info = start_engine.engines[role].info
    assert (record.block_size, record.block_bytes, record.kv_blocks, record.engine_pids) == (
        info.block_size, info.block_bytes, info.kv_blocks, info.pids,
    )  # fmt: skip
    assert (record.max_num_seqs, record.staging_bytes) == (17, MiB)
    assert (record.adapter_slots > 0) is (role is not Role.DECODE)
    await worker.close()
    assert await store.workers() == []


@pytest.fixture
def quick_renewals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("preft.worker.server.RENEWAL_SECONDS", 0.05)
    monkeypatch.setattr("preft.worker.server.RETRY_SECONDS", 0.01)


@pytest.mark.usefixtures("quick_renewals")
async def test_a_registration_that_the_store_has_lost_comes_back(
    settings: Settings, store: FakeStore, start_engine: StartFake
) -> None:
    worker = await start(Role.DECODE, settings, store, start_engine)
    for _ in range(2):
        store.lose_workers()
        count = len(store.renewals)
        await until(lambda: len(store.renewals) > count)  # noqa: B023
        assert await store.workers() == [worker.record]
    assert {lifetime for _, lifetime in store.renewals[1:]} == {LIFETIME}
    await worker.close()
    count = len(store.renewals)
    await asyncio.sleep(0.15)
    assert len(store.renewals) == count
    assert await store.workers() == []


async def test_a_renewal_that_fails_is_tried_again_soon(
    settings: Settings, store: FakeStore, start_engine: StartFake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("preft.worker.server.RENEWAL_SECONDS", 0.05)
    monkeypatch.setattr("preft.worker.server.RETRY_SECONDS", 0.01)
    worker = await start(Role.DECODE, settings, store, start_engine)
    store.failing = Unavailable("the disk is full")
    await asyncio.sleep(0.2)
    monkeypatch.setattr("preft.worker.server.RENEWAL_SECONDS", 3600.0)
    store.lose_workers()
    store.failing = None
    await until(lambda: len(store.renewals) > 2)
    assert await store.workers() == [worker.record]
    store.failing = Unavailable("the disk is full")
    await worker.close()  # without a word about the registration, which expires
    assert start_engine.engines[Role.DECODE].closed


async def test_equal_models_have_equal_fingerprints(cluster: Cluster) -> None:
    assert cluster.prefill.record.fingerprint == cluster.decode.record.fingerprint != ""


async def test_says_what_it_uses_now(cluster: Cluster, tmp_path: Path) -> None:
    alice = write_adapter(tmp_path / "alice", "alice's")
    [first] = await cluster.first_tokens(PROMPT, GREEDY, alice, 1, "h")
    cluster.engines[Role.DECODE].going.clear()
    cluster.engines[Role.DECODE].stats.preemptions = 3
    prefill = cluster.prefill.status()
    assert prefill.tiers.host_adapters == prefill.tiers.slots_used == 1
    assert (prefill.running, prefill.open_handles, prefill.staging_bytes_used) == (0, 0, 0)
    assert prefill.staging_bytes_fit == MiB
    async with decode_stream(cluster.decode) as stream:
        [call] = stream.start(decode_request(GREEDY, first, alice.digest, "h"), 20)
        await until(lambda: cluster.engines[Role.DECODE].stats.running == 1)
        status = cluster.decode.status()
        assert (status.running, status.open_handles, status.tiers) == (1, 1, TierTotals())
        assert (status.kv_blocks_used, status.preemptions) == (2, 3)
        assert status.staging_bytes_used == MiB - status.staging_bytes_fit > 0
        cluster.engines[Role.DECODE].going.set()
        await rest(call)


async def test_routers_hear_of_each_other_s_requests(cluster: Cluster, tmp_path: Path) -> None:
    """Over the services as they are called: a router's own requests are left out of what it hears."""
    alice = write_adapter(tmp_path / "alice", "alice's")
    prefill, decode = (worker.record.address for worker in (cluster.prefill, cluster.decode))
    async with AsyncExitStack() as stack:
        watch = stack.enter_async_context
        (one, to_prefill), (two, _) = [await watch(watching(prefill, name, SECRET)) for name in ("one", "two")]
        (one_decode, _), (two_decode, _) = [await watch(watching(decode, name, SECRET)) for name in ("one", "two")]
        await two.until(lambda: bool(two.updates))
        assert two.updates[0].adapters == {}
        cluster.engines[Role.PREFILL].going.clear()
        cluster.engines[Role.DECODE].going.clear()
        target = workers_pb2.KvTarget(address=decode, handle="h")
        call = workers_pb2_grpc.PrefillWorkerStub(to_prefill).Prefill(
            workers_pb2.PrefillRequest(
                request_id="r",
                prompt_token_ids=PROMPT,
                sampling=sampling_to_proto(GREEDY),
                adapter=adapter_to_proto(alice),
                n=1,
                target=target,
            )
        )
        await two.until(
            lambda: two.knows(alice.digest) == AdapterStatus(AdapterState.SLOT, 1) and two.status.running == 1
        )
        assert two.status.other_prompts == 1
        await one.until(lambda: one.knows(alice.digest) == AdapterStatus(AdapterState.SLOT) and one.status.running == 1)
        assert one.status.other_prompts == 0
        cluster.engines[Role.PREFILL].going.set()
        events = [event async for event in call]
        await two.until(lambda: two.knows(alice.digest).other_prompts == two.status.other_prompts == 0)
        async with channel(cluster.decode, "one") as to_decode:
            stream = DecodeStream(workers_pb2_grpc.DecodeWorkerStub(to_decode), "decode", lambda: None)
            first = events[0].first_tokens.choices[0].token_ids[0]
            [choice] = stream.start(decode_request(GREEDY, first, alice.digest, "h"), 20)
            await two_decode.until(lambda: two_decode.status.other_sequences == 1)
            await one_decode.until(lambda: one_decode.status.kv_blocks_used == 2)
            assert (one_decode.status.other_sequences, one_decode.adapters) == (0, {})
            cluster.engines[Role.DECODE].going.set()
            await rest(choice)
            await two_decode.until(lambda: two_decode.status.running == two_decode.status.kv_blocks_used == 0)
            await stream.close()


@pytest.mark.parametrize("role", Role)
async def test_a_worker_that_ends_says_so_first(
    settings: Settings, store: FakeStore, start_engine: StartFake, role: Role
) -> None:
    worker = await start(role, settings, store, start_engine)
    async with AsyncExitStack() as stack:
        watchers = []
        for name in ("one", "two"):
            watcher, _ = await stack.enter_async_context(watching(worker.record.address, name, SECRET, interval=10.0))
            await watcher.until(lambda w=watcher: bool(w.updates))
            watchers.append(watcher)
        assert not worker.status().draining
        began = asyncio.get_running_loop().time()
        await worker.close()
        assert asyncio.get_running_loop().time() - began < 5
        for watcher in watchers:
            await watcher.until(lambda w=watcher: w.status.draining)


@pytest.mark.parametrize(
    ("role", "own"),
    [
        (Role.PREFILL, {"PrefillWorker", "WorkerAdapters", "AdapterContent", "WorkerStatus"}),
        (Role.DECODE, {"DecodeWorker", "KvTransfer", "WorkerStatus"}),
    ],
)
async def test_health_needs_no_secret_and_nothing_else_is_told(cluster: Cluster, role: Role, own: set[str]) -> None:
    worker = cluster.prefill if role is Role.PREFILL else cluster.decode
    names = {f"preft.v1.{name}" for name in own}
    async with grpc.aio.insecure_channel(worker.record.address) as stranger:
        stub = health_pb2_grpc.HealthStub(stranger)
        for name in ("", *names):
            reply = await stub.Check(health_pb2.HealthCheckRequest(service=name))
            assert reply.status == health_pb2.HealthCheckResponse.SERVING
    async with channel(worker) as to_worker:
        _, error = await broken(
            reflection_pb2_grpc.ServerReflectionStub(to_worker).ServerReflectionInfo(
                iter([reflection_pb2.ServerReflectionRequest(list_services="")])
            )
        )
    assert error.code() is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize("user", [None, "alice", "bob"])
async def test_two_workers_are_as_good_as_one_engine(cluster: Cluster, tmp_path: Path, user: str | None) -> None:
    adapter = write_adapter(tmp_path / user, user) if user else None
    assert await cluster.generate(GREEDY, adapter) == [tokens_of(adapter.digest if adapter else "", PROMPT, GREEDY)]
    assert cluster.engines[Role.DECODE].loaded == []


async def test_many_at_once(cluster: Cluster, tmp_path: Path) -> None:
    """Several choices of several users, whose KV all travels at the same time."""
    users = [write_adapter(tmp_path / f"user-{number}", str(number)) for number in range(8)]
    sampling = Sampling(max_tokens=9, temperature=1.0, seed=3)
    got = await asyncio.gather(*(cluster.generate(sampling, user, n=3) for user in users))
    for user, choices in zip(users, got, strict=True):
        assert choices == [
            tokens_of(user.digest, PROMPT, dataclasses.replace(sampling, seed=3 + index), index=index)
            for index in range(3)
        ]


async def test_workers_of_different_models_exchange_nothing(
    cluster: Cluster, settings: Settings, store: FakeStore, start_engine: StartFake, tmp_path: Path
) -> None:
    other_model = write_base(tmp_path / "other")
    (other_model / "config.json").write_text('{"architectures": ["Other"]}')
    other = await start(Role.DECODE, settings.model_copy(update={"model": other_model}), store, StartFake(), "other")
    mixed = Cluster(cluster.prefill, other, {})
    with pytest.raises(grpc.aio.AioRpcError, match="the KV layouts differ") as raised:
        await mixed.first_tokens(PROMPT, GREEDY, None, 1, "h")
    assert raised.value.code() is grpc.StatusCode.DATA_LOSS
    await until(mixed.idle)
    await other.close()


async def test_a_decode_worker_that_is_gone(cluster: Cluster, settings: Settings, store: FakeStore) -> None:
    other = await start(Role.DECODE, settings, store, StartFake(), "other")
    await other.close()
    with pytest.raises(grpc.aio.AioRpcError, match=other.record.address) as raised:
        await Cluster(cluster.prefill, other, {}).first_tokens(PROMPT, GREEDY, None, 1, "h")
    assert raised.value.code() is grpc.StatusCode.DATA_LOSS
    assert code_of(raised.value) == "kv_transfer_failed"


async def test_messages_of_very_long_requests_are_read(cluster: Cluster) -> None:
    """More than gRPC takes by itself, and more than one frame of KV."""
    async with decode_stream(cluster.decode) as stream:
        choices = [workers_pb2.DecodeChoice(output_token_ids=[1])]
        request = workers_pb2.DecodeRequest(
            handle="h", prompt_token_ids=[1] * (10 << 20), sampling=sampling_to_proto(GREEDY), choices=choices
        )
        with pytest.raises(TransferFailed, match="is unknown"):
            await rest(*stream.start(request, 20))


async def test_closing_ends_what_runs_and_frees_everything(
    settings: Settings, store: FakeStore, start_engine: StartFake
) -> None:
    before = asyncio.all_tasks()
    prefill = await start(Role.PREFILL, settings, store, start_engine)
    decode = await start(Role.DECODE, settings, store, start_engine)
    cluster = Cluster(prefill, decode, start_engine.engines)
    [first] = await cluster.first_tokens(PROMPT, GREEDY, None, 1, "h")
    start_engine.engines[Role.DECODE].going.clear()
    async with decode_stream(decode) as stream:
        [call] = stream.start(decode_request(GREEDY, first, "", "h"), 20)
        await until(lambda: start_engine.engines[Role.DECODE].stats.running == 1)
        await decode.close()
        with pytest.raises(WorkerLost):
            await rest(call)
    await prefill.close()
    assert await store.workers() == []
    for role, engine in start_engine.engines.items():
        assert engine.closed
        assert engine.stats.running == 0, role
    for arena in (prefill._arena, decode._arena):
        assert arena.used == 0
        with pytest.raises(NoRoom, match="closed"):
            await arena.reserve(1, timeout=1)
    await until(lambda: not [task for task in asyncio.all_tasks() - before if "registration" in task.get_name()])


async def test_knows_when_its_engine_has_died(cluster: Cluster) -> None:
    died = asyncio.create_task(cluster.decode.died())
    await asyncio.sleep(0.02)
    assert not died.done()
    cluster.engines[Role.DECODE].die("killed")
    assert await died == "killed"


async def test_tells_that_its_engine_stalls_and_kills_it_in_the_end(
    settings: Settings, store: FakeStore, start_engine: StartFake
) -> None:
    decode = settings.decode.model_copy(update={"engine_timeout": 2.0})
    worker = await start(Role.DECODE, settings.model_copy(update={"decode": decode}), store, start_engine)
    died = asyncio.create_task(worker.died())
    async with watching(worker.record.address, "router", SECRET) as (watcher, _):
        await watcher.until(lambda: bool(watcher.updates))
        assert watcher.status.stalled_seconds == 0
        start_engine.engines[Role.DECODE].answering.clear()
        await watcher.until(lambda: watcher.status.stalled_seconds > 0)
        assert not died.done()
        async with asyncio.timeout(20):
            assert await died == "it hung, and was killed after 2 s without a step"
    await worker.close()


@pytest.mark.parametrize(("staging", "warned"), [(MiB, False), (5 * 96, True)])
async def test_warns_of_staging_memory_that_long_prompts_do_not_fit_into(
    settings: Settings, store: FakeStore, start_engine: StartFake, caplog: Any, staging: int, warned: bool
) -> None:
    decode = settings.decode.model_copy(update={"staging_bytes": staging})
    worker = await start(Role.DECODE, settings.model_copy(update={"decode": decode}), store, start_engine)
    assert ("decode.staging_bytes: prompts of more than 20 tokens" in caplog.text) is warned
    await worker.close()


async def test_an_engine_that_does_not_start_leaves_nothing(
    settings: Settings, store: FakeStore, start_engine: StartFake
) -> None:
    start_engine.error = EngineFailed("out of memory")
    descriptors = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with pytest.raises(EngineFailed, match="out of memory"):
            await start(Role.PREFILL, settings, store, start_engine)
    assert await store.workers() == []
    assert len(os.listdir("/proc/self/fd")) <= descriptors + 1


async def test_a_start_that_fails_late_ends_the_engine(settings: Settings, start_engine: StartFake) -> None:
    class LateStore(FakeStore):
        async def put_worker(self, worker: Worker, lifetime: float) -> None:
            self.failing = Unavailable("the disk is full") if worker.address else None
            await super().put_worker(worker, lifetime)

        async def remove_worker(self, worker_id: str) -> None:
            self.failing = None
            await super().remove_worker(worker_id)

    store = LateStore()
    with pytest.raises(Unavailable, match="the disk is full"):
        await start(Role.DECODE, settings, store, start_engine)
    assert await store.workers() == []
    assert start_engine.engines[Role.DECODE].closed
