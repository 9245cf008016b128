"""Gateways and workers on several machines: each has its own folder, and all meet in one state store.

The engines are fake. A worker's setting `adapter_sources` keeps it from the other machines' folders.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx

from preft.cluster.adapters import open_catalog
from preft.cluster.content_server import serve_content
from preft.cluster.gateway_process import RunningGateway, run_gateway
from preft.cluster.model import with_model_length
from preft.cluster.secret import cluster_secret
from preft.cluster.stores import open_registrations
from preft.cluster.worker_process import worker_setup
from preft.core.cluster import Role
from preft.core.settings import MiB, load_settings
from preft.worker.server import StartEngine, WorkerServer
from support.worker_servers import StartFake

SECRET = "of these machines"
PROMPT = [5, 6, 7]


class Machines:
    """Starts gateways and workers, each on a machine of its own: the folder `root / name`."""

    def __init__(self, root: Path, model: Path, state: str, stack: AsyncExitStack) -> None:
        self.root = root
        self._model = model
        self._state = state
        self._stack = stack
        self.client = httpx.AsyncClient(timeout=60)

    def state_dir(self, name: str) -> Path:
        return self.root / name / "state"

    async def _open(self, name: str, **changes: Any) -> tuple[Any, Any]:
        given = {"model": str(self._model), "port": 0, "state_dir": str(self.state_dir(name)), "state": self._state}
        given |= {"prefill": {"staging_bytes": MiB}, "decode": {"staging_bytes": MiB}, "store": {"host_bytes": MiB}}
        given |= {"cluster_secret": SECRET, **changes}
        settings = with_model_length(load_settings(None, given))
        store = open_registrations(settings)
        self._stack.push_async_callback(store.close)
        return settings, store

    async def gateway(self, name: str, **changes: Any) -> tuple[RunningGateway, Callable[[], Any]]:
        """A gateway, and the function that ends it. `changes` are further settings."""
        settings, store = await self._open(name, **changes)
        own = await self._stack.enter_async_context(AsyncExitStack())
        catalog = await own.enter_async_context(open_catalog(settings))
        secret = cluster_secret(settings)
        address = await own.enter_async_context(serve_content(settings, secret, catalog))
        return await own.enter_async_context(run_gateway(settings, secret, store, catalog, "", address)), own.aclose

    async def worker(
        self, name: str, role: Role = Role.PREFILL, start_engine: StartEngine | None = None
    ) -> WorkerServer:
        settings, store = await self._open(name, adapter_sources=[])
        start = start_engine or StartFake()
        worker = await WorkerServer.start(worker_setup(settings, role), name, "127.0.0.1", store, start)
        self._stack.push_async_callback(worker.close)
        return worker

    async def ready(self, *gateways: RunningGateway, workers: int) -> None:
        async with asyncio.timeout(20):
            for gateway in gateways:
                while sum(seen.status.tiers.host_bytes_total > 0 for seen in gateway.router.workers()) != workers:
                    await asyncio.sleep(0.02)
                while not gateway.router.ready():
                    await asyncio.sleep(0.02)

    async def ask(self, gateway: RunningGateway, name: str, **headers: str) -> httpx.Response:
        body: dict[str, Any] = {"model": name, "prompt": PROMPT, "max_tokens": 3, "ignore_eos": True, "temperature": 0}
        body["return_token_ids"] = True
        return await self.client.post(f"http://{gateway.address}/v1/completions", json=body, headers=headers)

    async def until_known(self, gateway: RunningGateway, name: str) -> str:
        """The adapter's digest, once the gateway knows the name."""
        async with asyncio.timeout(20):
            while (adapter := gateway.catalog.get(name)) is None:
                await asyncio.sleep(0.02)
            return adapter.digest
