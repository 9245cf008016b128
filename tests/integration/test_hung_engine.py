"""Engines that hang under load, for a while or for ever. Workers, router and HTTP are real, engines are fake."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from preft.core.cluster import Role, WorkerState
from preft.core.settings import MiB, Settings
from preft.worker.server import StartEngine
from support.http import post
from support.local_cluster import LocalCluster, local_cluster
from support.models import make_lora, make_model
from support.streams import Stream
from support.worker_servers import PacedEngine
from support.worker_services import until

pytestmark = pytest.mark.timeout(120)

ENGINE_TIMEOUT = 4.0
TOKENS = 60
ADAPTERS = (None, "ann", "bea")


class StartKept(StartEngine):
    """Keeps the engines that it starts, by role."""

    def __init__(self) -> None:
        self.engines: dict[Role, list[PacedEngine]] = {Role.PREFILL: [], Role.DECODE: []}

    async def __call__(self, settings: Settings, role: Role, arena: str, adapter_arena: str) -> PacedEngine:
        engine = PacedEngine(role, arena, adapter_arena, kv_blocks=4096)
        self.engines[role].append(engine)
        return engine


class Rig:
    """Two workers of each role."""

    def __init__(self, cluster: LocalCluster, engines: dict[Role, list[PacedEngine]]) -> None:
        self.cluster = cluster
        self.engines = engines

    def hang(self, engine: PacedEngine) -> None:
        self.cluster.loop.call_soon_threadsafe(engine.answering.clear)

    def go_on(self, engine: PacedEngine) -> None:
        self.cluster.loop.call_soon_threadsafe(engine.answering.set)

    @property
    def stalled(self) -> set[str]:
        """The workers of which the router knows that they stall."""

        async def read() -> set[str]:
            return set(self.cluster.gateway.router.view.stalled)

        return self.cluster.call(read())

    @property
    def ready(self) -> int:
        """The number of workers that the router takes for ready."""

        async def read() -> int:
            return sum(seen.state is WorkerState.READY for seen in self.cluster.gateway.router.workers())

        return self.cluster.call(read())

    def stream(self, client: httpx.AsyncClient, number: int) -> Stream:
        """Under an adapter or none, by `number`."""
        name = ADAPTERS[number % len(ADAPTERS)]
        adapter = self.cluster.gateway.catalog.get(name) if name else None
        return Stream(client, name or "model", number, TOKENS, adapter.digest if adapter else "")

    @property
    def resumes(self) -> int:
        return self.cluster.gateway.router.stats().resumes


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "model", max_position_embeddings=128)


@pytest.fixture
def rig(model: Path, tmp_path: Path) -> Iterator[Rig]:
    start = StartKept()
    own = {"replicas": 2, "staging_bytes": MiB, "engine_timeout": ENGINE_TIMEOUT}
    with local_cluster(model, tmp_path / "state", start_engine=start, prefill=own, decode=own) as cluster:
        for number, name in enumerate(filter(None, ADAPTERS)):
            adapter = make_lora(tmp_path / name, model, rank=4, seed=number)
            load = {"lora_name": name, "lora_path": str(adapter)}
            assert post(cluster.url, "/v1/load_lora_adapter", load).status_code == 200
        yield Rig(cluster, start.engines)


def client_of(rig: Rig) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=rig.cluster.url, trust_env=False, timeout=60)


async def test_streams_of_a_decode_engine_that_hangs_go_on_elsewhere(rig: Rig) -> None:
    async with client_of(rig) as client:
        streams = [rig.stream(client, number) for number in range(9)]
        await until(lambda: all(len(stream.tokens) > 3 for stream in streams))
        hung = max(rig.engines[Role.DECODE], key=lambda engine: engine.stats.running)
        assert hung.stats.running > 2
        rig.hang(hung)
        await until(lambda: len(rig.stalled) == 1)
        seen, before = len(hung.requests), rig.resumes
        for stream in [rig.stream(client, number) for number in range(9, 15)]:
            await stream.check()
        assert len(hung.requests) == seen  # requests went past the stalled worker
        for stream in streams:
            await stream.check()
        assert rig.resumes > before
        await until(lambda: rig.ready == 3)
        assert rig.stalled == set()


async def test_requests_of_a_prefill_engine_that_hangs_are_tried_elsewhere(rig: Rig) -> None:
    async with client_of(rig) as client:
        for stream in [rig.stream(client, number) for number in range(6)]:
            await stream.check()
        hung = rig.engines[Role.PREFILL][0]
        rig.hang(hung)
        streams = [rig.stream(client, number) for number in range(20, 32)]
        await until(lambda: len(rig.stalled) == 1)
        assert hung.stats.running > 0
        seen = len(hung.requests)
        for stream in [rig.stream(client, number) for number in range(40, 46)]:
            await stream.check()
        assert len(hung.requests) == seen
        for stream in streams:
            await stream.check()
        await until(lambda: rig.ready == 3)


async def test_idle_engines_that_hang_are_found_before_they_get_requests(rig: Rig) -> None:
    hung = [engines[0] for engines in rig.engines.values()]
    for engine in hung:
        rig.hang(engine)
    await until(lambda: len(rig.stalled) == 2)
    await until(lambda: rig.ready == 2)
    async with client_of(rig) as client:
        for stream in [rig.stream(client, number) for number in range(6)]:
            await stream.check()
    assert [engine.requests for engine in hung] == [[], []]


async def test_an_engine_that_goes_on_in_time_keeps_its_streams(rig: Rig) -> None:
    async with client_of(rig) as client:
        streams = [rig.stream(client, number) for number in range(6)]
        await until(lambda: all(len(stream.tokens) > 3 for stream in streams))
        engines = rig.engines[Role.PREFILL] + rig.engines[Role.DECODE]
        for engine in engines:
            rig.hang(engine)
        streams += [rig.stream(client, number) for number in range(6, 9)]  # all workers stall: the requests wait there
        await until(lambda: len(rig.stalled) == 4)
        for engine in engines:
            rig.go_on(engine)
        for stream in streams:
            await stream.check()
        await until(lambda: not rig.stalled)
        assert rig.ready == 4
        assert rig.resumes == 0
