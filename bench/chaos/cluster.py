"""The cluster of `make chaos`: Redis, `preft serve` with two workers of each role under Ray, and a second gateway."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from bench.redis_server import RedisServer, running_redis
from preft.core.errors import PreftError
from preft.core.settings import MiB
from preft_loadgen.http_stream import HttpClient
from preft_loadgen.served import Served, ServeFailed, served

EXAMPLE = Path(__file__).parents[2] / "examples" / "personal_memory"
MODEL_NAME = "base"
ADAPTERS = ("alice", "bruno", "chen-loreft", "dalia-loreft", "emil-direft", "fatima-direft")
EACH = 2  # workers of a role
ENGINE_TIMEOUT = 15.0  # seconds; far below the default, so that a hung engine is replaced within the run
READY_SECONDS = 600.0
NOTICED_SECONDS = 30.0
LOOK_SECONDS = 0.25


class ChaosCluster:
    """The running processes. `gateways` are the URLs of those that live."""

    def __init__(self, redis: RedisServer, serve: Served, config: Path, folder: Path) -> None:
        self.redis = redis
        self._serve, self._config, self._folder = serve, config, folder
        self._second = ExitStack()
        self._gateway: Served | None = None
        self._number = 0

    @property
    def gateways(self) -> list[str]:
        return [one.url for one in (self._serve, self._gateway) if one is not None]

    def start_gateway(self) -> None:
        """Starts the second gateway, and returns once it is ready."""
        self._number += 1
        self._gateway = self._second.enter_context(
            served(
                ["--config", str(self._config), "--state", self.redis.url],
                state_dir=self._folder / "state",
                log=self._folder / f"gateway-{self._number}.log",
                command=(sys.executable, "-m", "preft.cli", "gateway"),
                ready_seconds=READY_SECONDS,
            )
        )

    def kill_gateway(self) -> str:
        """Kills the second gateway; returns its URL."""
        if self._gateway is None:
            raise PreftError("there is no second gateway")
        gateway, self._gateway = self._gateway, None
        os.kill(gateway.pid, signal.SIGKILL)
        with suppress(ServeFailed):  # that it was killed
            self._second.close()
        return gateway.url

    def close(self) -> None:
        self._second.close()

    async def workers(self) -> list[dict[str, Any]]:
        """The workers, as the first gateway sees them."""
        found: list[dict[str, Any]] = (await HttpClient(self._serve.url).get_json("/v1/workers"))["workers"]
        return found

    async def worker(self, role: str) -> dict[str, Any]:
        """A ready worker of the role."""
        return next(one for one in await self.workers() if one["role"] == role and one["state"] == "ready")

    async def whole(self) -> bool:
        """Whether all workers are ready."""
        ready = [one for one in await self.workers() if one["state"] == "ready"]
        return len(ready) == 2 * EACH

    async def wait_broken(self) -> None:
        """Waits until the gateway has noticed that a worker is gone. Raises PreftError after a while."""
        end = time.monotonic() + NOTICED_SECONDS
        while await self.whole():
            if time.monotonic() > end:
                raise PreftError("no gateway notices that a worker is gone")
            await asyncio.sleep(LOOK_SECONDS)

    async def wait_whole(self) -> float:
        """Waits until all workers are ready for two looks; returns the seconds. Raises PreftError after a while."""
        began = time.monotonic()
        looks = 0
        while looks < 2:
            looks = looks + 1 if await self.whole() else 0
            if time.monotonic() - began > READY_SECONDS:
                raise PreftError("the cluster isn't whole again")
            await asyncio.sleep(LOOK_SECONDS)
        return time.monotonic() - began

    async def leftovers(self) -> dict[str, int]:
        """What idle workers still hold: requests, handles, staging bytes and KV blocks. Empty if all is given back."""
        keys = ("running", "open_handles", "staging_bytes_used")
        held = {key: sum(one["status"][key] for one in await self.workers()) for key in keys}
        return {key: value for key, value in held.items() if value}


@asynccontextmanager
async def chaos_cluster(folder: Path) -> AsyncIterator[ChaosCluster]:
    """Starts everything in `folder`, and ends it with the context. Raises PreftError or LoadgenError."""
    engine = {
        "replicas": EACH,
        "max_num_seqs": 32,
        "kv_cache_bytes": 64 * MiB,
        "staging_bytes": 64 * MiB,
        "engine_timeout": ENGINE_TIMEOUT,
    }
    settings = {
        "model": str(EXAMPLE / "model"),
        "served_model_name": MODEL_NAME,
        "adapters": {name: str(EXAMPLE / "adapters" / name) for name in ADAPTERS},
        "prefill": {**engine, "max_loras": 4, "max_lora_rank": 8},
        "decode": engine,
        "store": {"host_bytes": 64 * MiB},
    }
    config = folder / "settings.json"
    config.write_text(json.dumps(settings))  # JSON is YAML
    with running_redis(folder / "redis") as redis:
        arguments = ["--config", str(config), "--state", redis.url]
        log = folder / "serve.log"
        with served(arguments, state_dir=folder / "state", log=log, ready_seconds=READY_SECONDS) as serve:
            cluster = ChaosCluster(redis, serve, config, folder)
            try:
                cluster.start_gateway()
                await cluster.wait_whole()
                yield cluster
            finally:
                cluster.close()
