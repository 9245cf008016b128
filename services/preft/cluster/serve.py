"""`preft serve`: a gateway and its workers from one Settings object, until a signal ends both. No process is left.

The first signal lets running requests finish for `shutdown_timeout`: this gateway's own, then those that other gateways
have at its workers. The second signal ends them at once.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from pathlib import Path

from preft.cluster.autoscale import Autoscaler
from preft.cluster.console import Console, WorkerProgress
from preft.cluster.gateway_process import RunningGateway
from preft.cluster.logs import logging_to, new_log_folder
from preft.cluster.model import with_model_length
from preft.cluster.process import Stop, told_in_a_sentence
from preft.cluster.ray_environment import set_ray_environment
from preft.cluster.serving import open_gateway, serve_until_stopped
from preft.cluster.stores import open_registrations
from preft.core.errors import Unavailable
from preft.core.ports import StateStore
from preft.core.settings import Settings

logger = logging.getLogger(__name__)

REARM_SECONDS = 0.01


def serve(settings: Settings) -> None:
    """Serves until SIGINT, SIGTERM or SIGHUP; reports on stdout. Raises PreftError if the cluster can't serve."""
    import uvloop

    uvloop.run(_serve(with_model_length(settings)))


async def _serve(settings: Settings) -> None:
    stop = Stop()
    stop.arm()
    console = Console()
    cluster_id = uuid.uuid4().hex[:8]
    if settings.ray_address is None:
        set_ray_environment()
    logs = new_log_folder(settings.state_dir, cluster_id)
    with logging_to(logs / "serve.log"), told_in_a_sentence("the server"):
        console.line(f"PreFT Serve starts; log files are in {logs}")
        store = open_registrations(settings)
        try:
            async with AsyncExitStack() as stack:
                gateway = await open_gateway(stack, settings, store, cluster_id, stop, console)
                if gateway is not None:
                    await _serve_with_workers(settings, gateway, store, cluster_id, logs, stop, console)
        finally:
            await store.close()


async def _serve_with_workers(
    settings: Settings,
    gateway: RunningGateway,
    store: StateStore,
    cluster_id: str,
    logs: Path,
    stop: Stop,
    console: Console,
) -> None:
    from preft.cluster.ray_cluster import RayCluster

    loop = asyncio.get_running_loop()
    cluster = RayCluster(settings, cluster_id, logs, console.line)
    scaler = Autoscaler(settings, gateway.router, cluster, console.line)
    with ThreadPoolExecutor(1, "ray") as thread:  # Ray's own, so that no other work delays the end
        try:
            await _start_cluster(loop.run_in_executor(thread, cluster.start, stop.asked.is_set), stop)
            progress = WorkerProgress(console, f"{cluster.id}-")
            scaler.start()

            def drain() -> None:
                scaler.stop()
                cluster.drain(gateway.router.name)

            await serve_until_stopped(
                settings,
                gateway,
                stop,
                console,
                cluster.wait_failed(),
                lambda: progress.observe(gateway.router.workers(), cluster.members(*settings.roles)),
                drain,
            )
            await cluster.end(stop.at_once)
        finally:
            console.status("")
            await scaler.close()
            await loop.run_in_executor(thread, cluster.close)
            await _remove_registrations(store, cluster.id)


async def _remove_registrations(store: StateStore, cluster_id: str) -> None:
    """Removes the registrations of killed workers. While the store can't be used, they are left to expire."""
    try:
        for worker in await store.workers():
            if worker.id.startswith(f"{cluster_id}-"):
                await store.remove_worker(worker.id)
    except Unavailable as error:
        logger.warning("the workers' registrations are left to expire: %s", error)


async def _start_cluster(starting: asyncio.Future[None], stop: Stop) -> None:
    """Waits for Ray's start. Ray's C++ core makes SIGTERM abort the process: the handlers are set repeatedly."""
    while not starting.done():
        await asyncio.wait({starting}, timeout=REARM_SECONDS)
        stop.arm()
    starting.result()
