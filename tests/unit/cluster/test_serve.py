"""`preft serve` ends when it is told to, whatever else goes on. Ray is left out."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import httpx
import pytest

from preft.cluster.serve import _serve
from preft.cluster.stores import open_catalog_store
from preft.core.cluster import Role
from preft.core.errors import ConfigError, EngineFailed, PreftError
from preft.core.settings import Settings, load_settings
from support.faulty_http import Faults, FaultyServer, serve_folder
from support.lora_folders import write_base, write_lora
from support.redis_server import RedisServer, free_port
from support.small_tokenizers import byte_level
from support.worker_services import until


class FakeRay:
    """A RayCluster without workers."""

    def __init__(self) -> None:
        self.done: list[str] = []

    def __call__(self, settings: Settings, cluster_id: str, logs: Path, tell: Callable[[str], None]) -> FakeRay:
        self.id = cluster_id
        return self

    def start(self, is_stopped: Callable[[], bool]) -> None:
        self.done.append("start")

    def members(self, *roles: Role) -> list[str]:
        return []

    def drain(self, but: str) -> None:
        self.done.append("drain")

    async def end(self, at_once: asyncio.Event) -> None:
        self.done.append("end")

    def close(self) -> None:
        self.done.append("close")

    async def wait_failed(self) -> str:
        await asyncio.Event().wait()
        raise AssertionError


@pytest.fixture(autouse=True)
def cluster(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    module = ModuleType("preft.cluster.ray_cluster")
    module.RayCluster = cluster = FakeRay()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "preft.cluster.ray_cluster", module)
    return cluster


@pytest.fixture
def source(tmp_path: Path) -> Iterator[FaultyServer]:
    """Where an adapter begins to come, and never ends."""
    write_lora(tmp_path / "served" / "ada")
    with serve_folder(tmp_path / "served", Faults(stall_after=100)) as server:
        yield server


def listening_url(capsys: pytest.CaptureFixture[str]) -> str:
    found = re.search(r"listening on (http://[^;\s]+)", capsys.readouterr().out)
    assert found is not None
    return found[1]


def settings_in(folder: Path, **changes: object) -> Settings:
    model = write_base(byte_level(folder / "model"))
    given = {"model": str(model), "state_dir": str(folder / "state"), "port": 0, "max_model_len": 64, **changes}
    return load_settings(None, given)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_a_signal_ends_the_loading_of_adapters(
    cluster: FakeRay, tmp_path: Path, source: FaultyServer, number: int
) -> None:
    own = settings_in(tmp_path, adapters={"ada": f"{source.url}/ada"}, store={"source_timeout": 30})
    serving = asyncio.create_task(_serve(own))
    await until(lambda: any("GET" in request for request in source.requests))
    os.kill(os.getpid(), number)
    await asyncio.wait_for(serving, 5)
    assert cluster.done == []
    assert [entry.name for entry in (tmp_path / "state" / "adapters").iterdir()] == [".lock"]


async def test_a_signal_ends_the_adding_of_adapters(
    cluster: FakeRay,
    tmp_path: Path,
    source: FaultyServer,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("preft.cluster.gateway_process.SHUTDOWN_SECONDS", 0.2)
    adapters = tmp_path / "state" / "adapters"
    own = settings_in(tmp_path, shutdown_timeout=0.2, store={"source_timeout": 30}, adapter_sources=[source.url])
    serving = asyncio.create_task(_serve(own))
    await until(lambda: cluster.done == ["start"])
    url = listening_url(capsys)
    async with httpx.AsyncClient(base_url=url) as client:
        bodies = [{"name": "ada", "source": f"{source.url}/ada", "stream": stream} for stream in (False, True)]
        asking = [asyncio.create_task(client.post("/v1/adapters", json=body)) for body in bodies]
        await until(lambda: len(list(adapters.iterdir())) == 3)
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.wait_for(serving, 5)
        await until(lambda: [entry.name for entry in adapters.iterdir()] == [".lock"])
        await asyncio.gather(*asking, return_exceptions=True)


async def test_an_adapter_that_can_not_be_loaded_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^adapters\.ada: there is no folder"):
        await _serve(settings_in(tmp_path, adapters={"ada": str(tmp_path / "nowhere")}))


async def test_the_cluster_is_closed_while_other_threads_are_busy(cluster: FakeRay, tmp_path: Path) -> None:
    over = threading.Event()
    serving = asyncio.create_task(_serve(settings_in(tmp_path)))
    try:
        await until(lambda: cluster.done == ["start"])
        loop = asyncio.get_running_loop()
        loop.set_default_executor(ThreadPoolExecutor(1))
        busy = loop.run_in_executor(None, over.wait)
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.wait_for(serving, 5)
        assert cluster.done == ["start", "drain", "end", "close"]
    finally:
        over.set()
    await busy


async def test_a_cluster_uses_the_store_that_the_settings_name(
    cluster: FakeRay, tmp_path: Path, redis_server: RedisServer
) -> None:
    own = settings_in(tmp_path, state=redis_server.url(), adapters={"ada": str(write_lora(tmp_path / "ada"))})
    serving = asyncio.create_task(_serve(own))
    await until(lambda: cluster.done == ["start"])
    catalog = open_catalog_store(own)
    assert [adapter.name for adapter in (await catalog.adapter_changes(0)).put] == ["ada"]
    await catalog.close()
    redis_server.kill()
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.wait_for(serving, 15)  # although the store is away
    assert cluster.done == ["start", "drain", "end", "close"]
    assert not list((tmp_path / "state").rglob("*.sqlite"))


async def test_a_store_that_is_away_ends_the_start(cluster: FakeRay, tmp_path: Path) -> None:
    own = settings_in(tmp_path, state=f"redis://ann:hidden-word@127.0.0.1:{free_port()}/0")
    with pytest.raises(PreftError, match=r"^the state store redis://127.0.0.1:\d+/0 can't be used") as caught:
        await _serve(own)
    assert "hidden-word" not in str(caught.value)
    assert not any("hidden-word" in file.read_text() for file in (tmp_path / "state").rglob("*.log"))
    assert cluster.done == []


async def test_signals_refuse_what_comes_and_then_end_what_runs(
    cluster: FakeRay, tmp_path: Path, source: FaultyServer, capsys: pytest.CaptureFixture[str]
) -> None:
    own = settings_in(tmp_path, shutdown_timeout=60, store={"source_timeout": 60}, adapter_sources=[source.url])
    serving = asyncio.create_task(_serve(own))
    await until(lambda: cluster.done == ["start"])
    async with httpx.AsyncClient(base_url=listening_url(capsys), timeout=20) as client:
        body = {"name": "ada", "source": f"{source.url}/ada"}
        adding = asyncio.create_task(client.post("/v1/adapters", json=body))  # never ends by itself
        await until(lambda: any("GET" in request for request in source.requests))
        os.kill(os.getpid(), signal.SIGTERM)
        await until(lambda: "stopping" in capsys.readouterr().out)
        assert (await client.get("/ready")).status_code == 503
        late = await client.post("/v1/adapters", json=body)
        assert (late.status_code, late.json()["error"]["code"]) == (503, "shutting_down")
        assert not adding.done()
        os.kill(os.getpid(), signal.SIGTERM)
        reply = await adding
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "shutting_down")
        await asyncio.wait_for(serving, 10)
    assert cluster.done == ["start", "drain", "end", "close"]


async def test_workers_that_can_not_be_started_end_the_server(
    cluster: FakeRay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def wait_failed() -> str:
        return "the worker decode-0 couldn't be started"

    monkeypatch.setattr(cluster, "wait_failed", wait_failed)
    with pytest.raises(EngineFailed, match=r"^the worker decode-0 couldn't be started$"):
        await asyncio.wait_for(_serve(settings_in(tmp_path, shutdown_timeout=60)), 10)
    assert cluster.done == ["start", "close"]


async def test_what_nobody_foresaw_is_one_sentence_and_its_traceback_is_in_the_log(
    cluster: FakeRay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def start(is_stopped: Callable[[], bool]) -> None:
        raise KeyError("surprise")

    monkeypatch.setattr(cluster, "start", start)
    with pytest.raises(PreftError, match="unexpected error ended the server: KeyError: 'surprise'"):
        await _serve(settings_in(tmp_path))
    (log,) = (tmp_path / "state" / "logs").glob("*/serve.log")
    assert "Traceback" in log.read_text()
    assert "Traceback" not in "".join(capsys.readouterr())
