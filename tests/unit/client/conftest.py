"""One cluster of fake workers, and one scripted gateway, for all tests of the client."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from preft.core.cluster import Role
from preft.core.settings import MiB, Settings
from preft.worker.server import StartEngine
from support import small_tokenizers
from support.fake_engine import FakeEngine
from support.fake_parsers import FakeParsers
from support.local_cluster import LocalCluster, local_cluster
from support.models import make_lora, make_model
from support.redis_server import free_port
from support.sdk_clients import IDS, STYLES, a_client
from support.sdk_gateway import ScriptedGateway, gateway_in_thread
from support.small_tokenizers import TOOLS_TEMPLATE


class StartKept(StartEngine):
    """Starts fake engines and keeps them."""

    def __init__(self) -> None:
        self.engines: dict[Role, FakeEngine] = {}

    async def __call__(self, settings: Settings, role: Role, arena: str, adapter_arena: str) -> FakeEngine:
        self.engines[role] = FakeEngine(role, arena, adapter_arena, kv_blocks=4096)
        return self.engines[role]


@dataclass(frozen=True)
class Served:
    """A cluster over fake engines. `loras` are folders of adapters that aren't added."""

    cluster: LocalCluster
    engines: dict[Role, FakeEngine]
    urls: dict[str, str]
    loras: tuple[Path, ...]


@pytest.fixture(scope="package")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    model = make_model(folder / "model", vocab_size=1000, max_position_embeddings=128)
    loras = tuple(make_lora(folder / f"lora-{seed}", model, seed=seed) for seed in range(3))
    small, start, port = {"staging_bytes": MiB}, StartKept(), free_port()
    with local_cluster(
        model,
        folder / "state",
        start_engine=start,
        prefill=small,
        decode=small,
        grpc_port=port,
        adapter_sources=[str(folder)],
        served_model_name="base",
        adapters={"alice": str(loras[0])},
    ) as cluster:
        urls = {"http": cluster.url, "grpc": f"grpc://127.0.0.1:{port}"}
        yield Served(cluster, start.engines, urls, loras[1:])


@pytest.fixture(scope="package")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_tokenizers.byte_level(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="package")
def shared_gateway(tokenizer_folder: Path) -> Iterator[ScriptedGateway]:
    with gateway_in_thread(tokenizer_folder) as gateway:
        yield gateway


@pytest.fixture
def gateway(shared_gateway: ScriptedGateway) -> ScriptedGateway:
    """A gateway that answers with a short text until a test scripts it."""
    shared_gateway.reset()
    return shared_gateway


@pytest.fixture(scope="package")
def parsing_gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScriptedGateway]:
    """A gateway that reads calls and reasoning as FakeParsers do."""
    folder = small_tokenizers.byte_level(tmp_path_factory.mktemp("tools"), chat_template=TOOLS_TEMPLATE)
    with gateway_in_thread(folder, parsers=FakeParsers()) as gateway:
        yield gateway


@pytest.fixture(params=STYLES, ids=IDS)
def way(request: pytest.FixtureRequest) -> tuple[str, str]:
    """A transport and a style: every test with it runs four times."""
    chosen: tuple[str, str] = request.param
    return chosen


@pytest.fixture
def client(way: tuple[str, str], served: Served) -> Iterator[Any]:
    """A client of the cluster."""
    with a_client(way[1], served.urls[way[0]]) as client:
        yield client


@pytest.fixture
def scripted(way: tuple[str, str], gateway: ScriptedGateway) -> Iterator[Any]:
    """A client of the scripted gateway, without retries."""
    with a_client(way[1], gateway.urls[way[0]], retries=0) as client:
        yield client
