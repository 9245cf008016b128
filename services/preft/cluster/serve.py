"""`preft serve`: a whole cluster from one Settings object, until a signal ends it. Nothing is left running."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import signal
import time
import uuid
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from typing import Any, TypeVar

from preft.cluster.adapters import open_catalog
from preft.cluster.gateway_process import run_gateway
from preft.cluster.model import with_model_length
from preft.core.errors import EngineFailed
from preft.core.settings import Settings
from preft.state import open_store, remove_gone_workers

T = TypeVar("T")

logger = logging.getLogger(__name__)


def serve(settings: Settings) -> None:
    """Serves until SIGINT or SIGTERM; says on stdout when it's ready. Raises PreftError if it can't be served."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    import uvloop

    uvloop.run(_serve(with_model_length(settings)))


async def _serve(settings: Settings) -> None:
    if settings.ray_address is None:
        # A Ray without a token runs anything for every caller. Ray reads these as it is imported.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    from preft.cluster.ray_cluster import RayCluster

    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    cluster_id = uuid.uuid4().hex[:8]
    settings.state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    store_path = settings.state_dir / "state.sqlite"
    store = open_store(store_path)
    try:
        await remove_gone_workers(store)
        async with AsyncExitStack() as stack:
            catalog = await _unless(stop, stack.enter_async_context(open_catalog(settings)))
            if catalog is None:
                return
            gateway = await stack.enter_async_context(run_gateway(settings, store, catalog, cluster_id))
            thread = stack.enter_context(ThreadPoolExecutor(1, "ray"))  # no other work keeps the end waiting
            print(f"PreFT Serve starts on http://{gateway.address}", flush=True)
            cluster = RayCluster(settings, cluster_id, store_path)
            try:
                await loop.run_in_executor(thread, cluster.start)
                ready = asyncio.create_task(_say_when_ready(gateway.address, gateway.router.ready))
                stopped = asyncio.create_task(stop.wait())
                failed = asyncio.create_task(cluster.wait_failed())
                await asyncio.wait({stopped, failed, gateway.task}, return_when=asyncio.FIRST_COMPLETED)
                ready.cancel()
                gateway.server.should_exit = True
                await gateway.task  # running requests have some seconds, and their workers as long
                if failed.done():
                    raise EngineFailed(f"a worker couldn't be started, several times in a row: {failed.result()}")
                failed.cancel()
            finally:
                await loop.run_in_executor(thread, cluster.close)
                for worker in await store.workers():
                    if worker.id.startswith(cluster_id):
                        await store.remove_worker(worker.id)
    finally:
        await store.close()


async def _unless(stop: asyncio.Event, start: Coroutine[Any, Any, T]) -> T | None:
    """What `start` returns; None if `stop` is set before, which ends it."""
    starting = asyncio.create_task(start)
    stopped = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({starting, stopped}, return_when=asyncio.FIRST_COMPLETED)
        return None if stop.is_set() else starting.result()
    finally:
        starting.cancel()
        stopped.cancel()
        await asyncio.gather(starting, stopped, return_exceptions=True)


async def _say_when_ready(address: str, ready: Callable[[], bool]) -> None:
    started = time.monotonic()
    while not ready():
        await asyncio.sleep(0.2)
    print(f"PreFT Serve is ready on http://{address} after {time.monotonic() - started:.0f} s", flush=True)
