"""`preft serve` ends while another gateway uses its workers too. Ray and processes are real, engines are fake."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator, Iterator
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
from preft.core.cluster import Role
from preft.core.request import Sampling
from preft.core.settings import Settings
from support.fake_engine import tokens_of
from support.processes import ServerProcess, running
from support.small_tokenizers import byte_level
from support.worker_servers import StartPaced, settings_for, start
from support.worker_services import until

pytestmark = pytest.mark.timeout(180)

TOKENS = 100
BUSY = 30.0  # seconds, on a machine that does other things too


@pytest.fixture
def shared(tmp_path: Path) -> Settings:
    byte_level(tmp_path / "base")
    given = {"port": 0, "max_model_len": 128, "state": str(tmp_path / "shared.sqlite"), "shutdown_timeout": 30.0}
    return with_model_length(settings_for(tmp_path, **given))


def serve(settings: Settings, folder: Path, shutdown_timeout: float) -> Iterator[ServerProcess]:
    """`preft serve`, ready."""
    own = settings.model_dump(mode="json", exclude_defaults=True)
    own |= {"state": settings.state.get_secret_value(), "cluster_secret": settings.cluster_secret.get_secret_value()}  # type: ignore[union-attr]
    own |= {"shutdown_timeout": shutdown_timeout}
    (folder / "settings.json").write_text(json.dumps(own))
    with running(["--config", str(folder / "settings.json")], folder / "serve.log", "support.fake_serve") as process:
        process.said(r"is ready on (http://\S+)", 90)
        yield process


@pytest.fixture
def patient(shared: Settings, tmp_path: Path) -> Iterator[ServerProcess]:
    yield from serve(shared, tmp_path, 30.0)


@pytest.fixture
def hasty(shared: Settings, tmp_path: Path) -> Iterator[ServerProcess]:
    yield from serve(shared, tmp_path, 0.5)


@pytest.fixture
async def other(shared: Settings) -> AsyncIterator[RunningGateway]:
    """A gateway of this process."""
    store = open_registrations(shared)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(store.close)
        opened = await open_gateway(stack, shared, store, "", Stop(), Console())
        assert opened is not None
        await until(opened.router.ready, BUSY)
        yield opened


@asynccontextmanager
async def peers(settings: Settings) -> AsyncIterator[None]:
    """A prefill and a decode worker of this process."""
    store = open_registrations(settings)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(store.close)
        for role in (Role.PREFILL, Role.DECODE):
            worker = await start(role, settings, store, StartPaced(), f"peer-{role}")
            stack.push_async_callback(worker.close)
        yield


class Stream:
    """A completion that is streamed to a task. `tokens` grow as they come."""

    def __init__(self, url: str, number: int) -> None:
        self.prompt = [5, 6, number]
        self.tokens: list[int] = []
        self.task = asyncio.create_task(self._read(url))

    async def _read(self, url: str) -> None:
        body = {"model": "base", "prompt": self.prompt, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
        body |= {"stream": True, "return_token_ids": True}
        async with (
            httpx.AsyncClient(base_url=url, trust_env=False, timeout=60) as client,
            client.stream("POST", "/v1/completions", json=body) as reply,
        ):
            async for line in reply.aiter_lines():
                if line.startswith("data: {"):
                    event = json.loads(line[6:])
                    assert "error" not in event, event
                    self.tokens += event["choices"][0].get("token_ids") or []

    @property
    def is_right(self) -> bool:
        sampling = Sampling(max_tokens=TOKENS, temperature=0.0, ignore_eos=True)
        return self.tokens == tokens_of("", self.prompt, sampling)


def states(gateway: RunningGateway) -> set[str]:
    return {seen.state.value for seen in gateway.router.workers() if not seen.worker.id.startswith("peer-")}


async def test_streams_of_both_gateways_end_whole(patient: ServerProcess, other: RunningGateway) -> None:
    """The serving gateway's own streams include some that wait for a worker when the signal comes."""
    own = patient.said(r"is ready on (http://\S+)")
    theirs = [Stream(f"http://{other.address}", number) for number in range(8)]
    ours = [Stream(own, 100 + number) for number in range(30)]
    await until(lambda: all(len(stream.tokens) > 3 for stream in theirs), BUSY)
    assert any(not stream.tokens for stream in ours)
    patient.signal(signal.SIGTERM)
    await until(lambda: states(other) == {"draining"}, BUSY)
    assert any(not stream.task.done() for stream in theirs)
    await asyncio.gather(*(stream.task for stream in (*theirs, *ours)))
    assert all(stream.is_right for stream in (*theirs, *ours))
    stats = other.router.stats()
    assert (stats.retries, stats.resumes) == (0, 0)
    assert await asyncio.to_thread(patient.ended) == 0
    await until(lambda: other.router.workers() == [], BUSY)


async def test_streams_that_take_too_long_go_on_at_a_peer(
    hasty: ServerProcess, other: RunningGateway, shared: Settings
) -> None:
    streams = [Stream(f"http://{other.address}", number) for number in range(8)]
    await until(lambda: all(len(stream.tokens) > 3 for stream in streams), BUSY)
    async with peers(shared):
        await until(lambda: len(other.router.workers()) == 4, BUSY)
        hasty.signal(signal.SIGTERM)
        await asyncio.gather(*(stream.task for stream in streams))
        assert all(stream.is_right for stream in streams)
        assert other.router.stats().resumes == len(streams)
        assert await asyncio.to_thread(hasty.ended) == 0
        await until(lambda: states(other) == set(), BUSY)
