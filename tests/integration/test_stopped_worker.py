"""A worker's process that is stopped for a while, as a frozen machine is, and continues. Engines are fake."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path

import httpx
import pytest

from preft.cluster.console import Console
from preft.cluster.gateway_process import RunningGateway
from preft.cluster.model import with_model_length
from preft.cluster.process import Stop
from preft.cluster.serving import open_gateway
from preft.cluster.stores import open_registrations
from preft.core.cluster import Role, WorkerSeen, WorkerState
from preft.core.settings import Settings
from support.processes import ServerProcess, running
from support.small_tokenizers import byte_level
from support.streams import Stream
from support.worker_servers import StartPaced, settings_for, start
from support.worker_services import until

pytestmark = [pytest.mark.long, pytest.mark.timeout(180)]

TOKENS = 100
STOPPED_SECONDS = 20.0  # longer than the router and gRPC wait for a worker
BUSY = 60.0  # seconds, on a machine that does other things too


@pytest.fixture
def shared(tmp_path: Path) -> Settings:
    byte_level(tmp_path / "base")
    given = {"port": 0, "max_model_len": 128, "state": str(tmp_path / "shared.sqlite")}
    return with_model_length(settings_for(tmp_path, **given))


@contextmanager
def worker_process(role: Role, folder: Path, config: Path) -> Iterator[ServerProcess]:
    """`preft worker`, not yet ready."""
    arguments = ["--role", role.value, "--id", f"{role.value}-a", "--config", str(config)]
    with running(arguments, folder / f"{role.value}-a.log", "support.fake_worker") as process:
        yield process
        process.signal(signal.SIGCONT)


@pytest.fixture
def processes(shared: Settings, tmp_path: Path) -> Iterator[dict[Role, ServerProcess]]:
    """A prefill worker and a decode worker as processes, ready."""
    own = shared.model_dump(mode="json", exclude_defaults=True)
    own |= {"state": shared.state.get_secret_value(), "cluster_secret": shared.cluster_secret.get_secret_value()}  # type: ignore[union-attr]
    (config := tmp_path / "settings.json").write_text(json.dumps(own))
    with (
        worker_process(Role.PREFILL, tmp_path, config) as prefill,
        worker_process(Role.DECODE, tmp_path, config) as decode,
    ):
        for process in (prefill, decode):
            process.said(r"is ready on (\S+)", BUSY)
        yield {Role.PREFILL: prefill, Role.DECODE: decode}


@pytest.fixture
async def gateway(shared: Settings) -> AsyncIterator[RunningGateway]:
    store = open_registrations(shared)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(store.close)
        opened = await open_gateway(stack, shared, store, "", Stop(), Console())
        assert opened is not None
        yield opened


def seen(gateway: RunningGateway, worker_id: str) -> WorkerSeen:
    return next(seen for seen in gateway.router.workers() if seen.worker.id == worker_id)


@pytest.mark.parametrize("role", [Role.PREFILL, Role.DECODE])
async def test_its_requests_go_on_elsewhere_and_nothing_late_reaches_anybody(
    shared: Settings, processes: dict[Role, ServerProcess], gateway: RunningGateway, role: Role
) -> None:
    store = open_registrations(shared)
    stopped = f"{role.value}-a"
    async with (
        AsyncExitStack() as peers,
        httpx.AsyncClient(base_url=f"http://{gateway.address}", trust_env=False, timeout=BUSY) as client,
    ):
        peers.push_async_callback(store.close)
        await until(gateway.router.ready, BUSY)
        streams = [Stream(client, "base", number, TOKENS) for number in range(8)]
        await until(lambda: all(len(stream.tokens) > 3 for stream in streams), BUSY)
        for each in (Role.PREFILL, Role.DECODE):
            peer = await start(each, shared, store, StartPaced(), f"{each.value}-b")
            peers.push_async_callback(peer.close)
        await until(lambda: [one.state for one in gateway.router.workers()] == 4 * [WorkerState.READY], BUSY)

        processes[role].signal(signal.SIGSTOP)
        streams += [Stream(client, "base", number, TOKENS) for number in range(8, 20)]
        ends = asyncio.get_running_loop().time() + STOPPED_SECONDS
        for stream in streams:
            await stream.check()
        stats = gateway.router.stats()
        assert stats.retries if role is Role.PREFILL else stats.resumes
        assert seen(gateway, stopped).state is WorkerState.DEAD
        await asyncio.sleep(max(0.0, ends - asyncio.get_running_loop().time()))

        processes[role].signal(signal.SIGCONT)
        await until(lambda: seen(gateway, stopped).state is WorkerState.READY, BUSY)

        def all_is_given_back() -> bool:
            told = [one.status for one in gateway.router.workers()]
            return all((one.running, one.open_handles, one.staging_bytes_used) == (0, 0, 0) for one in told)

        await until(all_is_given_back, BUSY)
        assert seen(gateway, stopped).worker.pid == processes[role].pid

        await peers.aclose()
        await until(lambda: len(gateway.router.workers()) == 2, BUSY)
        for stream in [Stream(client, "base", number, TOKENS) for number in range(30, 36)]:
            await stream.check()
