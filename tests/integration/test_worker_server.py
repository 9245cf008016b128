"""Whole workers but for the model: registration, health, what they report, and KV between two of them over gRPC."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import time
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

from preft.cluster.worker import HEARTBEAT_SECONDS, StartEngine, WorkerServer
from preft.core.cluster import Role, Worker, WorkerState
from preft.core.errors import EngineFailed, InvalidRequest, TransferFailed, Unavailable, WorkerLost
from preft.core.ports import StateStore
from preft.core.request import AdapterRef, GenerateRequest, Sampling
from preft.core.settings import MiB, Settings, load_settings
from preft.router.decode_stream import DecodeStream
from preft.router.router import Router
from preft.rpc import workers_pb2, workers_pb2_grpc
from preft.rpc.convert import adapter_to_proto, sampling_to_proto
from preft.rpc.secret import ClusterChannel, ClusterSecret
from preft.state.sqlite import SqliteStore
from support.fake_engine import FakeEngine, tokens_of
from support.lora_folders import write_base
from support.worker_services import broken, code_of, rest, until, write_adapter

PROMPT = (5, 6, 7, 8, 9)
SECRET = ClusterSecret("of these tests alone")
GREEDY = Sampling(max_tokens=8, temperature=0.0)


class StartFake(StartEngine):
    """Starts fake engines and keeps them; `hold` delays the start, `error` fails it."""

    def __init__(self) -> None:
        self.engines: dict[Role, FakeEngine] = {}
        self.hold = asyncio.Event()
        self.hold.set()
        self.error: Exception | None = None
        self.arenas: list[str] = []

    async def __call__(self, settings: Settings, role: Role, arena: str, adapter_arena: str) -> FakeEngine:
        self.arenas.append(arena)
        await self.hold.wait()
        if self.error is not None:
            raise self.error
        self.engines[role] = FakeEngine(role, arena, adapter_arena)
        return self.engines[role]


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    model = write_base(tmp_path / "base")
    own = {"staging_bytes": MiB, "max_num_seqs": 17}
    state = {
        "state_dir": str(tmp_path / "state"),
        "cluster_secret": "of these tests alone",
        "store": {"host_bytes": MiB},
    }
    return load_settings(None, {"model": str(model), "prefill": own, "decode": own, **state})


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[SqliteStore]:
    store = SqliteStore(tmp_path / "state.sqlite")
    yield store
    await store.close()


@pytest.fixture
def start_engine() -> StartFake:
    return StartFake()


class Cluster:
    """One worker of each role."""

    def __init__(self, prefill: WorkerServer, decode: WorkerServer, engines: dict[Role, FakeEngine]) -> None:
        self.prefill, self.decode = prefill, decode
        self.engines = engines

    def idle(self) -> bool:
        loads = (self.prefill.load(), self.decode.load())
        return all(
            (load.running, load.staging_bytes_used, load.open_handles) == (0, 0, 0)
            and load.kv_blocks_free == load.kv_blocks_total
            for load in loads
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


def channel(worker: WorkerServer) -> ClusterChannel:
    return ClusterChannel(worker.record.address, SECRET)


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


async def start(
    role: Role, settings: Settings, store: StateStore, start_engine: StartEngine, name: str | None = None
) -> WorkerServer:
    return await WorkerServer.start(settings, role, name or role.value, "127.0.0.1", store, start_engine)


@pytest.fixture
async def cluster(settings: Settings, store: SqliteStore, start_engine: StartFake) -> AsyncIterator[Cluster]:
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
    settings: Settings, store: SqliteStore, start_engine: StartFake, role: Role
) -> None:
    start_engine.hold.clear()
    before = time.time()
    starting = asyncio.create_task(start(role, settings, store, start_engine, "c-1"))
    await until(lambda: bool(start_engine.arenas))
    record = await registered(store)
    assert (record.id, record.role, record.state, record.pid) == ("c-1", role, WorkerState.STARTING, os.getpid())
    assert record.heartbeat >= before
    start_engine.hold.set()
    worker = await starting
    record = await registered(store)
    assert record == worker.record
    assert (record.id, record.role, record.state, record.pid) == ("c-1", role, WorkerState.READY, os.getpid())
    assert record.address.startswith("127.0.0.1:")
    info = start_engine.engines[role].info
    assert (record.block_size, record.max_model_len, record.engine_pids) == (
        info.block_size, info.max_model_len, info.pids,
    )  # fmt: skip
    assert record.max_num_seqs == 17
    assert record.load.kv_blocks_total == record.load.kv_blocks_free == info.kv_blocks
    assert (record.load.staging_bytes_total, record.load.staging_bytes_used) == (MiB, 0)
    await worker.close()


async def test_equal_models_have_equal_fingerprints(cluster: Cluster) -> None:
    assert cluster.prefill.record.fingerprint == cluster.decode.record.fingerprint != ""


async def test_heartbeats_bring_the_load(cluster: Cluster, store: SqliteStore) -> None:
    before = {worker.id: worker for worker in await store.workers()}
    cluster.engines[Role.DECODE].stats.kv_usage = 0.25
    cluster.engines[Role.DECODE].stats.preemptions = 3
    await asyncio.sleep(1.3 * HEARTBEAT_SECONDS)
    after = {worker.id: worker for worker in await store.workers()}
    for name, worker in after.items():
        assert worker.heartbeat > before[name].heartbeat
        assert worker.state is WorkerState.READY
    load = after["decode"].load
    assert (load.kv_blocks_free, load.kv_blocks_total, load.preemptions) == (48, 64, 3)
    cluster.engines[Role.DECODE].stats.kv_usage = 0.0


class FailingStore(SqliteStore):
    """A store that can't be written for a while."""

    failing = False

    async def put_worker(self, worker: Worker) -> None:
        if self.failing:
            raise Unavailable("the disk is full")
        await super().put_worker(worker)


async def test_heartbeats_outlive_a_store_that_fails(
    settings: Settings, start_engine: StartFake, tmp_path: Path
) -> None:
    store = FailingStore(tmp_path / "failing.sqlite")
    worker = await start(Role.DECODE, settings, store, start_engine)
    store.failing = True
    await asyncio.sleep(1.2 * HEARTBEAT_SECONDS)
    store.failing = False
    silent = (await registered(store)).heartbeat
    await asyncio.sleep(1.2 * HEARTBEAT_SECONDS)
    assert (await registered(store)).heartbeat > silent
    await worker.close()
    await store.close()


async def test_says_what_it_uses_now(cluster: Cluster, tmp_path: Path) -> None:
    alice = write_adapter(tmp_path / "alice", "alice's")
    [first] = await cluster.first_tokens(PROMPT, GREEDY, alice, 1, "h")
    cluster.engines[Role.DECODE].going.clear()
    prefill = cluster.prefill.load()
    assert prefill.adapters == (alice.digest,)
    assert (prefill.running, prefill.open_handles, prefill.staging_bytes_used) == (0, 0, 0)
    async with decode_stream(cluster.decode) as stream:
        [call] = stream.start(decode_request(GREEDY, first, alice.digest, "h"), 20)
        await until(lambda: cluster.engines[Role.DECODE].stats.running == 1)
        load = cluster.decode.load()
        assert (load.running, load.open_handles, load.adapters) == (1, 1, ())
        assert load.staging_bytes_used > 0
        assert load.kv_blocks_free == load.kv_blocks_total - 2
        cluster.engines[Role.DECODE].going.set()
        await rest(call)


@pytest.mark.parametrize(
    ("role", "own"),
    [(Role.PREFILL, {"PrefillWorker", "WorkerAdapters"}), (Role.DECODE, {"DecodeWorker", "KvTransfer"})],
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
    users = [write_adapter(tmp_path / f"user-{number}", str(number)) for number in range(12)]
    sampling = Sampling(max_tokens=9, temperature=1.0, seed=3)
    got = await asyncio.gather(*(cluster.generate(sampling, user, n=3) for user in users))
    for user, choices in zip(users, got, strict=True):
        assert choices == [
            tokens_of(user.digest, PROMPT, dataclasses.replace(sampling, seed=3 + index), index=index)
            for index in range(3)
        ]


async def test_workers_of_different_models_exchange_nothing(
    cluster: Cluster, settings: Settings, store: SqliteStore, start_engine: StartFake, tmp_path: Path
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


async def test_a_decode_worker_that_is_gone(cluster: Cluster, settings: Settings, store: SqliteStore) -> None:
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
    settings: Settings, store: SqliteStore, start_engine: StartFake
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
        with pytest.raises(TransferFailed, match="closed"):
            await arena.reserve(1, timeout=1)
    await until(lambda: not [task for task in asyncio.all_tasks() - before if "heartbeat" in task.get_name()])


async def test_knows_when_its_engine_has_died(cluster: Cluster) -> None:
    died = asyncio.create_task(cluster.decode.died())
    await asyncio.sleep(0.02)
    assert not died.done()
    cluster.engines[Role.DECODE].die("killed")
    assert await died == "killed"


@pytest.mark.parametrize(("staging", "warned"), [(MiB, False), (5 * 96, True)])
async def test_warns_of_staging_memory_that_long_prompts_do_not_fit_into(
    settings: Settings, store: SqliteStore, start_engine: StartFake, caplog: Any, staging: int, warned: bool
) -> None:
    decode = settings.decode.model_copy(update={"staging_bytes": staging})
    worker = await start(Role.DECODE, settings.model_copy(update={"decode": decode}), store, start_engine)
    assert ("decode.staging_bytes: prompts of more than 20 tokens" in caplog.text) is warned
    await worker.close()


@pytest.mark.parametrize("scarce", [Role.PREFILL, Role.DECODE])
async def test_no_prompt_is_computed_twice_for_lack_of_staging_memory(
    settings: Settings, store: SqliteStore, start_engine: StartFake, scarce: Role
) -> None:
    """Decoding stands still for longer than a push may take: what has no room waits in the router's queue."""
    sampling = Sampling(max_tokens=4, temperature=0.0)
    own = settings.engine(scarce).model_copy(update={"staging_bytes": 1000})  # three prompts of two blocks
    router = settings.router.model_copy(update={"transfer_timeout": 0.3, "poll_interval": 0.05})
    settings = settings.model_copy(update={scarce.value: own, "router": router})
    prompts = [(1, 2, 3, 4, number) for number in range(30)]
    async with AsyncExitStack() as stack:
        workers = [await start(role, settings, store, start_engine) for role in (Role.PREFILL, Role.DECODE)]
        for worker in workers:
            stack.push_async_callback(worker.close)
        decoding = start_engine.engines[Role.DECODE].going
        decoding.clear()
        async with Router(store, settings.router, SECRET) as routed:

            async def tokens(prompt: tuple[int, ...]) -> list[int]:
                async with routed.generate(GenerateRequest("r", prompt, sampling)) as generation:
                    return [token async for delta in generation for token in delta.token_ids]

            asking = asyncio.gather(*map(tokens, prompts))
            await asyncio.sleep(1.0)
            decoding.set()
            assert await asking == [tokens_of("", prompt, sampling) for prompt in prompts]
            assert routed.stats().resumes == routed.stats().retries == 0
            assert len(start_engine.engines[Role.PREFILL].requests) == len(prompts)
            with pytest.raises(InvalidRequest, match=rf"of 41 tokens doesn't fit .* raise {scarce}\.staging_bytes"):
                await tokens(tuple(range(41)))


async def test_an_engine_that_does_not_start_leaves_nothing(
    settings: Settings, store: SqliteStore, start_engine: StartFake
) -> None:
    start_engine.error = EngineFailed("out of memory")
    descriptors = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with pytest.raises(EngineFailed, match="out of memory"):
            await start(Role.PREFILL, settings, store, start_engine)
    assert await store.workers() == []
    assert len(os.listdir("/proc/self/fd")) <= descriptors + 1


async def test_a_start_that_fails_late_ends_the_engine(
    settings: Settings, start_engine: StartFake, tmp_path: Path
) -> None:
    class LateStore(FailingStore):
        async def put_worker(self, worker: Worker) -> None:
            self.failing = worker.state is WorkerState.READY
            await super().put_worker(worker)

    store = LateStore(tmp_path / "late.sqlite")
    with pytest.raises(Unavailable, match="the disk is full"):
        await start(Role.DECODE, settings, store, start_engine)
    assert await store.workers() == []
    assert start_engine.engines[Role.DECODE].closed
    await store.close()
