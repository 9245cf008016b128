"""Gateways and workers that meet in one state store, over fake engines: which workers a gateway has, and which not."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import httpx
import pytest

from preft.cluster.console import Console
from preft.cluster.gateway_process import RunningGateway
from preft.cluster.model import with_model_length
from preft.cluster.process import Stop
from preft.cluster.serving import open_gateway
from preft.cluster.stores import open_registrations
from preft.cluster.worker_process import worker_setup
from preft.core.cluster import Role
from preft.core.settings import Settings
from preft.worker.server import WorkerServer
from support.lora_folders import write_lora
from support.small_tokenizers import byte_level
from support.worker_servers import StartFake, settings_for
from support.worker_services import until

BODY = {"model": "base", "prompt": [5, 6, 7], "max_tokens": 4, "temperature": 0, "ignore_eos": True}


def settings_of(folder: Path, **changes: object) -> Settings:
    byte_level(folder / "base")
    return with_model_length(settings_for(folder, **{"port": 0, "max_model_len": 64, **changes}))


@pytest.fixture
def shared(tmp_path: Path) -> Settings:
    return settings_of(tmp_path, state=str(tmp_path / "shared.sqlite"))


@asynccontextmanager
async def gateway(settings: Settings, cluster_id: str = "own") -> AsyncIterator[RunningGateway]:
    store = open_registrations(settings)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(store.close)
        opened = await open_gateway(stack, settings, store, cluster_id, Stop(), Console())
        assert opened is not None
        yield opened


@asynccontextmanager
async def worker(settings: Settings, role: Role, name: str) -> AsyncIterator[WorkerServer]:
    store = open_registrations(settings)
    started = await WorkerServer.start(worker_setup(settings, role), name, "127.0.0.1", store, StartFake())
    try:
        yield started
    finally:
        await started.close()
        await store.close()


@asynccontextmanager
async def workers(settings: Settings, prefix: str = "") -> AsyncIterator[None]:
    async with worker(settings, Role.PREFILL, f"{prefix}p"), worker(settings, Role.DECODE, f"{prefix}d"):
        yield


async def answer(gateway: RunningGateway) -> httpx.Response:
    async with httpx.AsyncClient(base_url=f"http://{gateway.address}", trust_env=False, timeout=20) as client:
        return await client.post("/v1/completions", json=BODY)


async def test_gateways_share_workers_that_come_and_go(shared: Settings) -> None:
    async with gateway(shared) as one, gateway(shared) as other:
        assert [(await answer(each)).status_code for each in (one, other)] == [503, 503]
        async with workers(shared):
            await until(lambda: one.router.ready() and other.router.ready())
            answers = [await answer(each) for each in (one, other, one, other)]
            assert [reply.status_code for reply in answers] == [200] * 4
            assert len({reply.json()["choices"][0]["text"] for reply in answers}) == 1
        await until(lambda: not one.router.workers() and not other.router.workers())
        waiting = [asyncio.create_task(answer(each)) for each in (one, other)]
        async with workers(shared):
            assert [(await reply).status_code for reply in waiting] == [200] * 2


async def test_clusters_without_a_shared_store_have_their_own_workers(tmp_path: Path) -> None:
    settings = settings_of(tmp_path)
    async with workers(settings, "one-"), gateway(settings, "one") as one, gateway(settings, "two") as two:
        await until(one.router.ready)
        assert [seen.worker.id for seen in one.router.workers()] == ["one-d", "one-p"]
        assert two.router.workers() == []
        assert [(await answer(each)).status_code for each in (one, two)] == [200, 503]


async def test_a_worker_with_another_secret_is_named_and_gets_no_requests(
    shared: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stranger = settings_of(tmp_path, state=str(tmp_path / "shared.sqlite"), cluster_secret="of another cluster")
    caplog.set_level(logging.WARNING, "preft")
    async with worker(shared, Role.PREFILL, "p"), worker(stranger, Role.DECODE, "d"), gateway(shared) as one:
        await until(lambda: [seen.state.value for seen in one.router.workers()] == ["dead", "ready"])
        async with asyncio.timeout(5):
            assert (await answer(one)).status_code == 503
        await asyncio.sleep(0.5)
        said = [record.getMessage() for record in caplog.records if "cluster_secret" in record.getMessage()]
        assert said == ["worker d gets no requests: worker d: the caller has another cluster_secret than this worker"]
        async with worker(shared, Role.DECODE, "d2"):
            await until(one.router.ready)
            assert [(await answer(one)).status_code for _ in range(5)] == [200] * 5


async def test_a_store_that_was_emptied_takes_no_worker_away(shared: Settings) -> None:
    store = open_registrations(shared)
    async with workers(shared), gateway(shared) as one:
        await until(one.router.ready)
        for name in ("p", "d"):
            await store.remove_worker(name)
        await asyncio.sleep(1.5)
        assert await store.workers() == []
        assert (await answer(one)).status_code == 200
        assert [seen.state.value for seen in one.router.workers()] == ["ready", "ready"]
    await store.close()


async def test_adapters_are_the_same_on_all_gateways(shared: Settings, tmp_path: Path) -> None:
    source = str(write_lora(tmp_path / "ada"))
    async with gateway(shared) as one, gateway(shared) as other:
        added = await one.catalog.add("ada", source)
        await until(lambda: other.catalog.get("ada") == added)
        await other.catalog.remove("ada")
        await until(lambda: one.catalog.get("ada") is None)
