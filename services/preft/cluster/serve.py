"""`preft serve`: a whole cluster from one Settings object, until a signal ends it. No process is left running.

The first signal lets running requests finish for `shutdown_timeout`; the second signal ends them at once.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import signal
import time
import uuid
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, TypeVar

from preft.cluster.adapters import open_catalog
from preft.cluster.console import Console, WorkerProgress, first_question
from preft.cluster.gateway_process import RunningGateway, run_gateway
from preft.cluster.logs import logging_to, new_log_folder
from preft.cluster.model import with_model_length
from preft.core.errors import ConfigError, EngineFailed, PreftError
from preft.core.settings import Settings
from preft.state import open_store, remove_gone_workers

T = TypeVar("T")

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
LOOK_SECONDS = 0.2
REARM_SECONDS = 0.01


def serve(settings: Settings) -> None:
    """Serves until SIGINT, SIGTERM or SIGHUP; reports on stdout. Raises PreftError if the cluster can't serve."""
    import uvloop

    uvloop.run(_serve(with_model_length(settings)))


class _Stop:
    """The stop requests from this process's signals: first stop, then stop at once."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.at_once = asyncio.Event()
        self._signals = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]

    def arm(self) -> None:
        """Installs the signal handlers, also again after Ray has replaced them."""
        loop = asyncio.get_running_loop()
        for number in self._signals:
            loop.add_signal_handler(number, self._signalled)

    def _signalled(self) -> None:
        (self.at_once if self.asked.is_set() else self.asked).set()


async def _serve(settings: Settings) -> None:
    stop = _Stop()
    stop.arm()
    console = Console()
    cluster_id = uuid.uuid4().hex[:8]
    if settings.ray_address is None:
        # Ray without a token runs code for every caller. Ray reads these variables at import.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    logs = new_log_folder(settings.state_dir, cluster_id)
    with logging_to(logs):
        console.line(f"PreFT Serve starts; log files are in {logs}")
        try:
            await _serve_logged(settings, cluster_id, logs, stop, console)
        except PreftError:
            raise
        except Exception as error:
            logger.info("the server ends", exc_info=error)
            if isinstance(error, OSError) and error.filename is not None:
                raise ConfigError(f"{error.filename}: {error.strerror}") from error
            raise PreftError(f"an unexpected error ended the server: {type(error).__name__}: {error}") from error


async def _serve_logged(settings: Settings, cluster_id: str, logs: Path, stop: _Stop, console: Console) -> None:
    from preft.cluster.ray_cluster import RayCluster

    loop = asyncio.get_running_loop()
    store_path = settings.state_dir / "state.sqlite"
    store = open_store(store_path)
    try:
        await remove_gone_workers(store)
        async with AsyncExitStack() as stack:
            catalog = await _unless(stop.asked, stack.enter_async_context(open_catalog(settings)))
            if catalog is None:
                return
            gateway = await stack.enter_async_context(run_gateway(settings, store, catalog, cluster_id))
            if stop.asked.is_set():
                return
            thread = stack.enter_context(
                ThreadPoolExecutor(1, "ray")
            )  # Ray's own, so that no other work delays the end
            console.line(f"listening on http://{gateway.address}; requests get 503 until the workers are ready")
            cluster = RayCluster(settings, cluster_id, store_path, logs)
            try:
                await _start_cluster(loop.run_in_executor(thread, cluster.start), stop)
                await _until_stopped(settings, gateway, cluster, cluster_id, stop, console)
            finally:
                console.status("")
                await loop.run_in_executor(thread, cluster.close)
                for worker in await store.workers():
                    if worker.id.startswith(cluster_id):
                        await store.remove_worker(worker.id)
    finally:
        await store.close()


async def _start_cluster(starting: asyncio.Future[None], stop: _Stop) -> None:
    """Waits for Ray's start. Ray's C++ core makes SIGTERM abort the process: the handlers are set repeatedly."""
    while not starting.done():
        await asyncio.wait({starting}, timeout=REARM_SECONDS)
        stop.arm()
    starting.result()


async def _until_stopped(
    settings: Settings, gateway: RunningGateway, cluster: Any, cluster_id: str, stop: _Stop, console: Console
) -> None:
    """Serves until a stop request or a worker's failed start, then drains. Raises EngineFailed."""
    tasks = [
        asyncio.create_task(stop.asked.wait(), name="stop"),
        asyncio.create_task(cluster.wait_failed(console.line), name="workers"),
        asyncio.create_task(_tell_progress(settings, gateway, cluster_id, console), name="progress"),
    ]
    stopped, failed, progress = tasks
    try:
        await asyncio.wait({stopped, failed, progress, gateway.task}, return_when=asyncio.FIRST_COMPLETED)
        progress.cancel()
        if failed.done():
            stop.at_once.set()
        elif stopped.done():
            console.line(f"stopping: running requests have {settings.shutdown_timeout:g} s; a second signal ends them")
        console.status("")
        await gateway.drain(settings.shutdown_timeout, stop.at_once)
        if failed.done():
            raise EngineFailed(failed.result())
        if progress.done() and not progress.cancelled():
            progress.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _tell_progress(settings: Settings, gateway: RunningGateway, cluster_id: str, console: Console) -> None:
    """Reports the workers' stages and, once, an example request. Runs for ever."""
    started = time.monotonic()
    names = [f"{role.value}-{number}" for role in settings.roles for number in range(settings.engine(role).replicas)]
    progress = WorkerProgress(console, [f"{cluster_id}-{name}" for name in names], f"{cluster_id}-")
    is_said = False
    while True:
        progress.observe(gateway.router.workers())
        if not is_said and gateway.router.ready():
            is_said = True
            adapters = gateway.catalog.list()
            ask = first_question(
                gateway.address,
                adapters[0].name if adapters else settings.model_name,
                is_chat=gateway.is_chat,
                max_model_len=settings.max_model_len or 1,
            )
            seconds = time.monotonic() - started
            console.line(f"PreFT Serve is ready on http://{gateway.address} after {seconds:.0f} s. Ask it:\n  {ask}")
        await asyncio.sleep(LOOK_SECONDS)


async def _unless(stop: asyncio.Event, start: Coroutine[Any, Any, T]) -> T | None:
    """The result of `start`. If `stop` is set earlier, cancels `start` and returns None."""
    starting = asyncio.create_task(start)
    stopped = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({starting, stopped}, return_when=asyncio.FIRST_COMPLETED)
        return None if stop.is_set() else starting.result()
    finally:
        starting.cancel()
        stopped.cancel()
        await asyncio.gather(starting, stopped, return_exceptions=True)
