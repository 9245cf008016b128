"""A cluster with fake engines over a real Redis: requests go on whatever happens to the server."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from preft.cluster import worker
from preft.cluster.stores import open_registrations
from preft.cluster.worker import StartEngine
from preft.core.cluster import Role
from preft.core.settings import MiB, Settings
from support.fake_engine import FakeEngine
from support.local_cluster import LocalCluster, local_cluster
from support.models import make_model
from support.redis_server import RedisServer

pytestmark = pytest.mark.timeout(120)


class StartFake(StartEngine):
    async def __call__(self, settings: Settings, role: Role, arena: str, adapter_arena: str) -> FakeEngine:
        return FakeEngine(role, arena, adapter_arena)


@pytest.fixture
def cluster(tmp_path: Path, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalCluster]:
    monkeypatch.setattr(worker, "RENEWAL_SECONDS", 0.5)
    monkeypatch.setattr(worker, "LIFETIME", 60.0)
    model = make_model(tmp_path / "model", max_position_embeddings=128)
    settings: dict[str, Any] = {"prefill": {"staging_bytes": MiB}, "decode": {"staging_bytes": MiB}}
    settings |= {"state": redis_server.url(), "store": {"catalog_timeout": 60}}
    with local_cluster(model, tmp_path / "state", start_engine=StartFake(), **settings) as cluster:
        yield cluster


def answer(cluster: LocalCluster, model: str) -> int:
    body = {"model": model, "prompt": [5, 6, 7], "max_tokens": 3, "ignore_eos": True, "temperature": 0}
    return httpx.post(f"{cluster.url}/v1/completions", json=body, timeout=20).status_code


def test_requests_go_on_without_the_store(cluster: LocalCluster, redis_server: RedisServer) -> None:
    redis_server.freeze()
    started = time.monotonic()
    while time.monotonic() < started + 3:
        assert answer(cluster, "model") == 200
    redis_server.thaw()
    redis_server.kill()
    for _ in range(3):
        assert answer(cluster, "model") == 200
        time.sleep(0.5)
    reply = httpx.delete(f"{cluster.url}/v1/adapters/ada", timeout=20)
    assert reply.status_code == 503
    assert "the state store redis://" in reply.json()["error"]["message"]
    redis_server.start()
    assert cluster.wait(lambda: answer(cluster, "model") == 200, 10)
    assert httpx.get(f"{cluster.url}/ready", timeout=20).status_code == 200


def test_workers_register_again_with_a_store_that_lost_them(cluster: LocalCluster, redis_server: RedisServer) -> None:
    async def registered() -> list[str]:
        store = open_registrations(cluster.settings)
        try:
            return [worker.id for worker in await store.workers()]
        finally:
            await store.close()

    everyone = cluster.call(registered())
    assert len(everyone) == 2
    redis_server.restart(with_data=False)
    assert cluster.wait(lambda: cluster.call(registered()) == everyone, 10)
    assert answer(cluster, "model") == 200
