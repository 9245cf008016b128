"""A worker ends as it is told to: after its requests, at once, while it loads, or with its engine."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from preft.cluster.process import Stop
from preft.cluster.stores import open_registrations
from preft.cluster.worker_process import check_addresses, run_worker
from preft.core.cluster import Role, Worker
from preft.core.errors import ConfigError
from preft.core.request import Sampling
from preft.core.settings import Settings, WorkerSettings, load_settings
from preft.router.decode_stream import DecodeStream
from preft.rpc import workers_pb2, workers_pb2_grpc
from preft.rpc.convert import sampling_to_proto
from preft.rpc.secret import ClusterChannel
from support.redis_server import free_port
from support.worker_servers import SECRET, StartFake, settings_for
from support.worker_services import rest, until


@dataclass
class Running:
    task: asyncio.Task[str | None]
    stop: Stop
    engines: StartFake
    ready: list[Worker]
    settings: Settings

    async def registered(self) -> list[str]:
        store = open_registrations(self.settings)
        try:
            return [worker.id for worker in await store.workers()]
        finally:
            await store.close()


@pytest.fixture
async def running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Running]:
    """A colocated worker named `w`."""
    monkeypatch.setattr("preft.worker.server.QUIET_SECONDS", 0.2)
    monkeypatch.setenv("VLLM_HOST_IP", "")  # set back afterwards
    settings = settings_for(tmp_path, state=str(tmp_path / "shared.sqlite"), shutdown_timeout=30, max_model_len=128)
    stop, engines, ready = Stop(), StartFake(), list[Worker]()
    work = run_worker(
        settings, Role.COLOCATED, "w", "127.0.0.1", stop, lambda worker: ready.append(worker.record), engines
    )
    task = asyncio.create_task(work)
    yield Running(task, stop, engines, ready, settings)
    stop.asked.set()
    stop.at_once.set()
    engines.hold.set()
    await task


async def asked(worker: Worker) -> list[int]:
    """The tokens of one request."""
    request = workers_pb2.DecodeRequest(
        request_id="r",
        handle="h",
        prompt_token_ids=[5, 6],
        sampling=sampling_to_proto(Sampling(max_tokens=4, temperature=0.0)),
        choices=[workers_pb2.DecodeChoice(index=0)],
    )  # fmt: skip
    async with ClusterChannel(worker.address, SECRET) as channel:
        stream = DecodeStream(workers_pb2_grpc.DecodeWorkerStub(channel), worker.id, lambda: None)
        tokens = await rest(*stream.start(request, 20))
        await stream.close()
    return list(tokens)


async def test_a_stop_request_lets_requests_finish(running: Running) -> None:
    await until(lambda: bool(running.ready))
    engine = running.engines.engines[Role.COLOCATED]
    engine.going.clear()
    request = asyncio.create_task(asked(running.ready[0]))
    await until(lambda: len(engine.requests) == 1)
    running.stop.asked.set()
    await asyncio.sleep(0.5)
    assert not running.task.done()
    assert await running.registered() == ["w"]
    engine.going.set()
    assert len(await request) == 4
    assert await asyncio.wait_for(running.task, 5) is None
    assert engine.closed
    assert await running.registered() == []


async def test_a_second_request_ends_the_worker_at_once(running: Running) -> None:
    await until(lambda: bool(running.ready))
    engine = running.engines.engines[Role.COLOCATED]
    engine.going.clear()
    request = asyncio.create_task(asked(running.ready[0]))
    await until(lambda: len(engine.requests) == 1)
    running.stop.asked.set()
    await asyncio.sleep(0.1)
    assert not running.task.done()
    running.stop.at_once.set()
    assert await asyncio.wait_for(running.task, 5) is None
    assert (await asyncio.gather(request, return_exceptions=True))[0] is not None
    assert engine.closed


async def test_a_stop_while_the_engine_loads_leaves_no_registration(running: Running) -> None:
    running.engines.hold.clear()
    await until(lambda: bool(running.engines.arenas))
    assert await running.registered() == ["w"]
    running.stop.asked.set()
    assert await asyncio.wait_for(running.task, 5) is None
    assert running.ready == []
    assert await running.registered() == []


@pytest.mark.parametrize("drains", [False, True])
async def test_the_engine_s_death_ends_the_worker(running: Running, drains: bool) -> None:
    await until(lambda: bool(running.ready))
    engine = running.engines.engines[Role.COLOCATED]
    engine.going.clear()
    request = asyncio.create_task(asked(running.ready[0]))
    await until(lambda: len(engine.requests) == 1)
    if drains:
        running.stop.asked.set()
        await asyncio.sleep(0.1)
    engine.die("no more memory")
    assert await asyncio.wait_for(running.task, 5) == "no more memory"
    await asyncio.gather(request, return_exceptions=True)
    assert await running.registered() == []


PLACES = [
    ("127.0.0.3", None, "127.0.0.3"),
    ("::1", None, "[::1]"),
    ("localhost", None, "localhost"),
    ("127.0.0.1", "localhost", "localhost"),
    ("0.0.0.0", "127.0.0.3", "127.0.0.3"),
    ("::", "::1", "[::1]"),
    ("::", "127.0.0.3", "127.0.0.3"),
]


@pytest.mark.parametrize(("host", "advertised", "registered"), PLACES)
async def test_a_worker_serves_under_the_address_that_it_registers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: str, advertised: str | None, registered: str
) -> None:
    """A router calls the registered address, and the worker takes calls for that address alone."""
    monkeypatch.setenv("VLLM_HOST_IP", "")  # set back afterwards
    settings = settings_for(tmp_path, state=str(tmp_path / "shared.sqlite"), max_model_len=128, insecure=True)
    stop, ready, port = Stop(), list[Worker](), free_port()
    work = run_worker(
        settings,
        Role.COLOCATED,
        "w",
        host,
        stop,
        lambda worker: ready.append(worker.record),
        StartFake(),
        port=port,
        advertise_host=advertised,
    )
    task = asyncio.create_task(work)
    await until(lambda: bool(ready))
    assert ready[0].address == f"{registered}:{port}"
    assert os.environ["VLLM_HOST_IP"] == {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    assert len(await asked(ready[0])) == 4
    stop.at_once.set()
    stop.asked.set()
    assert await asyncio.wait_for(task, 5) is None


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "[::]", "0", "::ffff:0.0.0.0"])
def test_an_address_that_means_every_address_is_not_registered(host: str) -> None:
    with pytest.raises(ConfigError, match=r"^worker\.host: other processes can't reach .* with --advertise-host$"):
        check_addresses(WorkerSettings(host=host))
    for name in ("worker", "peer_host"):
        key = "worker.advertise_host" if name == "worker" else name
        given = {"advertise_host": host} if name == "worker" else host
        with pytest.raises(ConfigError, match=rf"^{key}: other processes can't reach "):
            load_settings(None, {"model": "/m", name: given})


def test_a_worker_s_addresses_are_checked_before_its_engine_loads() -> None:
    check_addresses(WorkerSettings(host="0.0.0.0", advertise_host="decode-1"))
    with pytest.raises(ConfigError, match=r"^worker\.host: can't listen on 192\.0\.2\.1:0: "):
        check_addresses(WorkerSettings(host="192.0.2.1"))
    for host in ("http://decode-1", "decode-1:80", "", "*.example.com", "a b"):
        with pytest.raises(ConfigError, match=r"^worker\.advertise_host: "):
            load_settings(None, {"model": "/m", "worker": {"advertise_host": host}})
