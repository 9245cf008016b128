"""An upgrade under load: each process of a cluster is replaced by one of a newer version, one after the other."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
import yaml
from google.protobuf.unknown_fields import UnknownFieldSet

from bench.chaos.load import Load, make_cases
from preft.core.settings import MiB
from preft.rpc import workers_pb2, workers_pb2_grpc
from preft.rpc.secret import ClusterChannel, ClusterSecret
from support.models import make_lora, make_model, make_reft
from support.newer_version import FIELD, NUMBER
from support.processes import ServerProcess, running
from support.redis_server import RedisServer, running_redis

pytestmark = pytest.mark.timeout(900)

OLD, NEW = "same", "newer"
SECRET = "of both versions of it"
CLIENTS = 4
ANSWERS = 6  # between two replacements
STORED = """local text = ''
for _, key in ipairs(redis.call('KEYS', 'preft:*')) do
  if redis.call('TYPE', key).ok == 'string' then text = text .. redis.call('GET', key) end
end
return text"""


class Processes:
    """Starts and ends the cluster's processes. `urls` are the gateways that a load balancer would use."""

    def __init__(self, folder: Path, redis: RedisServer, stack: ExitStack, engines: str) -> None:
        self._folder, self._stack, self._engines = folder, stack, engines
        self._common = ["--state", redis.url(), "--state-dir", str(folder / "state")]
        self._common += ["--config", str(folder / "cluster.yaml")]
        self._running: dict[str, ServerProcess] = {}
        self.urls: dict[str, str] = {}

    def start(self, name: str, version: str, *arguments: str) -> None:
        arguments = (version, self._engines, *arguments, *self._common)
        process = running(list(arguments), self._folder / f"{name}.log", "support.newer_version")
        self._running[name] = self._stack.enter_context(process)

    def worker(self, role: str, name: str, version: str) -> None:
        self.start(name, version, "worker", "--role", role, "--id", name)

    def said(self, name: str, pattern: str) -> str:
        return self._running[name].said(pattern)

    def gateway(self, name: str, version: str) -> None:
        self.start(name, version, "gateway", "--port", "0")
        self.urls[name] = self.said(name, r"is ready on (http://\S+)")

    def end(self, name: str) -> None:
        """Ends a process in order. A gateway gets no new requests before that, as a load balancer sees to it."""
        url = self.urls.pop(name, None)
        if url is not None:
            assert self.urls, "a gateway must be left"
        self._running[name].signal(signal.SIGTERM)
        assert self._running[name].ended(120) == 0, self._running[name].output

    def ready_workers(self) -> list[set[str]]:
        """The ready workers, as each gateway sees them."""
        replies = [httpx.get(f"{url}/v1/workers", timeout=60, trust_env=False).json() for url in self.urls.values()]
        return [{one["id"] for one in reply["workers"] if one["state"] == "ready"} for reply in replies]


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with running_redis(tmp_path_factory.mktemp("redis")) as server:
        yield server


def settings_in(folder: Path) -> tuple[str, ...]:
    """Writes model, adapters and settings; returns the names that requests may use."""
    model = make_model(folder / "base", seed=3)
    adapters = {
        "lora": make_lora(folder / "lora", model, rank=8, seed=1),
        "loreft": make_reft(folder / "loreft", model, rank=4, seed=2),
        "both": make_reft(make_lora(folder / "both", model, rank=4, seed=4), model, method="direft", rank=2, scale=0.3),
    }
    engine = {"kv_cache_bytes": 64 * MiB, "staging_bytes": 64 * MiB}
    given = {
        "model": str(model),
        "adapters": {name: str(path) for name, path in adapters.items()},
        "cluster_secret": SECRET,
        "shutdown_timeout": 60,
        "store": {"host_bytes": 64 * MiB},
        "prefill": {**engine, "max_loras": 4, "max_lora_rank": 8},
        "decode": engine,
    }
    (folder / "cluster.yaml").write_text(yaml.safe_dump(given))
    return ("base", *adapters)


async def unknown_fields(address: str) -> set[int]:
    """The numbers of the fields in a worker's status that this version doesn't know."""
    async with ClusterChannel(address, ClusterSecret(SECRET)) as channel:
        call = workers_pb2_grpc.WorkerStatusStub(channel).Watch([workers_pb2.WatchRequest(interval=1.0)], timeout=60)
        async for update in call:
            return {field.field_number for field in UnknownFieldSet(update)}
    raise AssertionError("the worker tells nothing")


@pytest.mark.parametrize("engines", ["fake", pytest.param("real", marks=[pytest.mark.vllm, pytest.mark.long])])
async def test_no_request_fails_while_all_processes_are_replaced(
    redis: RedisServer, tmp_path: Path, engines: str
) -> None:
    names = settings_in(tmp_path)
    with ExitStack() as stack:
        cluster = Processes(tmp_path, redis, stack, engines)
        for role in ("prefill", "decode"):
            cluster.worker(role, f"{role}-old", OLD)
        for name in ("gateway-1", "gateway-2"):
            cluster.gateway(name, OLD)
        load = Load(list(cluster.urls.values()), make_cases(names, 512, seed=0))
        await load.learn()
        load.start(CLIENTS)

        async def go_on() -> None:
            load.urls[:] = cluster.urls.values()
            enough = load.counts.sent + CLIENTS + ANSWERS
            while load.counts.sent < enough:
                await asyncio.sleep(0.1)

        async def replace_worker(role: str) -> None:
            cluster.worker(role, f"{role}-new", NEW)
            address = await asyncio.to_thread(cluster.said, f"{role}-new", r"is ready on (\S+)")
            assert await unknown_fields(address) == {NUMBER}
            while not all(f"{role}-new" in seen for seen in await asyncio.to_thread(cluster.ready_workers)):
                await asyncio.sleep(0.1)
            await go_on()
            await asyncio.to_thread(cluster.end, f"{role}-old")
            await go_on()

        async def replace_gateway(old: str, new: str) -> None:
            await asyncio.to_thread(cluster.gateway, new, NEW)
            await go_on()
            load.urls.remove(cluster.urls[old])
            await asyncio.to_thread(cluster.end, old)
            await go_on()

        await go_on()
        await replace_worker("prefill")
        await replace_gateway("gateway-1", "gateway-3")
        await replace_worker("decode")
        await replace_gateway("gateway-2", "gateway-4")
        counts = await load.stop()
        assert cluster.ready_workers() == [{"prefill-new", "decode-new"}] * 2
        assert redis.command("EVAL", STORED, "0").count(FIELD) == 2  # the workers' registrations
    figures = counts.as_json()
    assert figures.pop("sent") > 8 * ANSWERS
    assert figures == {"failed": 0, "cut": 0, "wrong": 0, "duplicated": 0, "missing": 0, "errors": [], "cancelled": 0}
