"""What the clusters of `make chaos` have in common: two workers of each role, gateways, Redis, and their state."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
import uuid
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bench.chaos.resources import held, more_than
from bench.redis_server import RedisServer
from preft.core.errors import PreftError
from preft.core.settings import MiB
from preft_loadgen.served import Served, served
from preft_loadgen.transport.http import HttpClient

EXAMPLE = Path(__file__).parents[2] / "examples" / "personal_memory"
MODEL_NAME = "base"
ADAPTERS = ("alice", "bruno", "chen-loreft", "dalia-loreft", "emil-direft", "fatima-direft")
EACH = 2  # workers of a role
ENGINE_TIMEOUT = 15.0  # seconds; far below the default, so that a hung engine is replaced within the run
READY_SECONDS = 600.0
NOTICED_SECONDS = 30.0
LOOK_SECONDS = 0.25
GATEWAY = (sys.executable, "-m", "preft.cli", "gateway")


class ChaosCluster:
    """The running processes. `gateways` are the URLs of those that live."""

    def __init__(self, redis: RedisServer, state: str, config: Path, folder: Path) -> None:
        """`state` is the URL of `redis` for all processes."""
        self.redis, self.state = redis, state
        self.config, self.folder = config, folder
        self.mark = ""  # of all processes, in their environment
        self.start_figures: dict[str, int] = {}  # `held` before the first fault
        self._servers: dict[str, tuple[Served, ExitStack]] = {}  # gateways by URL, in order of their start
        self._number = 0

    @property
    def gateways(self) -> list[str]:
        return list(self._servers)

    @property
    def state_dir(self) -> Path:
        return self.folder / "state"

    def start_server(self, command: tuple[str, ...] = GATEWAY) -> str:
        """Starts a gateway, alone or with its workers; returns its URL once it is ready."""
        self._number += 1
        stack = ExitStack()
        server = stack.enter_context(
            served(
                ["--config", str(self.config), "--state", self.state],
                state_dir=self.state_dir,
                log=self.folder / f"server-{self._number}.log",
                command=command,
                ready_seconds=READY_SECONDS,
            )
        )
        self._servers[server.url] = (server, stack)
        return server.url

    def forget_server(self, url: str) -> tuple[Served, ExitStack]:
        """The gateway is no longer one of `gateways`; the stack ends it."""
        return self._servers.pop(url)

    def close(self) -> None:
        for url in reversed(self.gateways):
            _, stack = self.forget_server(url)
            stack.close()

    async def workers(self) -> list[dict[str, Any]]:
        """The workers, as the first gateway sees them."""
        found: list[dict[str, Any]] = (await HttpClient(self.gateways[0]).get_json("/v1/workers"))["workers"]
        return found

    async def ready_workers(self, role: str) -> list[dict[str, Any]]:
        return [one for one in await self.workers() if one["role"] == role and one["state"] == "ready"]

    async def worker(self, role: str) -> dict[str, Any]:
        """A ready worker of the role."""
        return (await self.ready_workers(role))[0]

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

    async def held(self) -> dict[str, int]:
        """What the processes hold, beside what requests hold."""
        pids = [server.pid for server, _ in self._servers.values()]
        for worker in await self.workers():
            pids += [worker["pid"], *worker["engine_pids"]]
        return await asyncio.to_thread(held, self.mark, pids, self.state_dir)

    async def leftovers(self) -> dict[str, Any]:
        """What idle workers still hold for requests, and what there is more of than at the start. Empty if nothing."""
        keys = ("running", "open_handles", "staging_bytes_used", "kv_blocks_used")
        used = {key: sum(one["status"][key] for one in await self.workers()) for key in keys}
        left: dict[str, Any] = {key: value for key, value in used.items() if value}
        return left | (more_than(self.start_figures, await self.held()) if self.start_figures else {})


def mark_children() -> str:
    """Marks the environment of all processes that are started from now on; returns the mark."""
    name, value = "CHAOS_RUN", uuid.uuid4().hex
    os.environ[name] = value
    return f"{name}={value}"


def write_settings(folder: Path, names: tuple[str, ...], **changes: Any) -> Path:
    """A settings file for the example model and these adapters. `changes` of a role are added to the role's."""
    engine = {
        "replicas": EACH,
        "max_num_seqs": 32,
        "kv_cache_bytes": 64 * MiB,
        "staging_bytes": 64 * MiB,
        "engine_timeout": ENGINE_TIMEOUT,
    }
    prefill, decode = changes.pop("prefill", {}), changes.pop("decode", {})
    settings = {
        "model": str(EXAMPLE / "model"),
        "served_model_name": MODEL_NAME,
        "adapters": {name: str(EXAMPLE / "adapters" / name) for name in names},
        "prefill": {**engine, "max_loras": 4, "max_lora_rank": 8, **prefill},
        "decode": {**engine, **decode},
        "store": {"host_bytes": 64 * MiB},
        **changes,
    }
    config = folder / "settings.json"
    config.write_text(json.dumps(settings))  # JSON is YAML
    return config
