"""One worker from its start to its end, under Ray or as `preft worker`.

The first stop request drains the worker: the routers send nothing more, and running requests have `shutdown_timeout`.
The second request ends the worker at once.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import sys
import uuid
from collections.abc import Callable
from functools import partial
from typing import NoReturn

from preft.cluster.adapters import open_adapters
from preft.cluster.console import Console
from preft.cluster.logs import cause_in, new_log_folder, output_in
from preft.cluster.model import model_identity, with_model_length
from preft.cluster.process import Stop, listen_on, told_in_a_sentence, unless
from preft.cluster.secret import cluster_secret
from preft.cluster.sizing import staging_bytes
from preft.cluster.stores import open_registrations
from preft.core.cluster import Role, Worker
from preft.core.errors import ConfigError, EngineFailed, PreftError
from preft.core.settings import Settings, WorkerSettings
from preft.core.web import is_unspecified, reachable
from preft.worker.server import StartEngine, WorkerServer
from preft.worker.setup import WorkerSetup


def worker_setup(settings: Settings, role: Role) -> WorkerSetup:
    """The set-up of a worker on this machine. Raises ConfigError if the model or the secret can't be read."""
    secret = cluster_secret(settings)
    return WorkerSetup(
        settings,
        role,
        secret,
        model_identity(settings.model),
        staging_bytes(settings, role),
        partial(open_adapters, settings, secret),
    )


async def run_worker(
    settings: Settings,
    role: Role,
    worker_id: str,
    host: str,
    stop: Stop,
    on_ready: Callable[[WorkerServer], None],
    start_engine: StartEngine | None = None,
    *,
    port: int = 0,
    advertise_host: str | None = None,
) -> str | None:
    """Runs a worker until its engine dies (returns the reason), or until it has stopped (returns None).

    The addresses are those of `WorkerServer.start`.

    A stop while the engine loads abandons the load, whose thread goes on. Raises the errors of `WorkerServer.start`.
    """
    os.environ["VLLM_HOST_IP"] = reachable(host)
    store = open_registrations(settings)
    try:
        setup = worker_setup(settings, role)
        starting = WorkerServer.start(
            setup,
            worker_id,
            host,
            store,
            start_engine or StartEngine(),
            port=port,
            advertise_host=advertise_host,
        )
        worker = await unless(stop.asked, starting)
        if worker is None:
            return None
        try:
            on_ready(worker)
            return await _until_stopped(worker, settings.shutdown_timeout, stop)
        finally:
            await worker.close()
    finally:
        await store.close()


async def _until_stopped(worker: WorkerServer, seconds: float, stop: Stop) -> str | None:
    """Returns the reason of the engine's death, or None once the worker has drained after a stop request."""
    died = asyncio.create_task(worker.died())
    stopped = asyncio.create_task(stop.asked.wait())
    hurry = asyncio.create_task(stop.at_once.wait())
    idle: asyncio.Task[None] | None = None
    try:
        await asyncio.wait({died, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if not died.done():
            worker.drain()
            idle = asyncio.create_task(worker.wait_idle())
            await asyncio.wait({died, idle, hurry}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        return died.result() if died.done() else None
    finally:
        tasks = [task for task in (died, stopped, hurry, idle) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def work(settings: Settings, role: Role, worker_id: str | None = None) -> None:
    """Runs a worker in this process until SIGINT, SIGTERM or SIGHUP; reports on stdout. `settings.state` must be set.

    Raises EngineFailed if the engine can't be started or dies, and PreftError if the worker can't work.
    """
    check_addresses(settings.worker)
    settings = with_model_length(settings)
    worker_id = worker_id or f"{role.value}-{uuid.uuid4().hex[:8]}"
    logs = new_log_folder(settings.state_dir, worker_id)
    log = logs / f"{worker_id}.log"
    with output_in(log) as stdout, told_in_a_sentence(f"the worker {worker_id}"):
        console = Console(stdout)
        console.line(f"The worker {worker_id} starts; its log is {log}")
        started: list[Worker] = []
        try:
            with asyncio.Runner() as runner:
                reason = runner.run(_work(settings, role, worker_id, console, started))
                if reason is None and not started:
                    _leave_the_load()
        except Exception as error:
            if started or isinstance(error, PreftError):
                raise
            cause = cause_in(log) or f"{type(error).__name__}: {error}"
            raise EngineFailed(f"the worker {worker_id} couldn't be started: {cause}; its log is {log}") from error
        if reason is not None:
            raise EngineFailed(
                f"the worker {worker_id} ends, its engine has died: {reason.rstrip('.')}; its log is {log}"
            )


def check_addresses(worker: WorkerSettings) -> None:
    """Raises ConfigError if the worker can't listen, or would register an address that no other process can reach.

    Says so before the engine loads, which takes long.
    """
    if worker.advertise_host is None and is_unspecified(worker.host):
        raise ConfigError(
            f"worker.host: other processes can't reach a worker at {worker.host}: name this machine's address or DNS "
            "name with --advertise-host"
        )
    listen_on(worker.host, worker.port, "worker.").close()


def _leave_the_load() -> NoReturn:
    """Ends this process and its engine while the engine loads. The thread that loads it can't be stopped."""
    for child in multiprocessing.active_children():
        child.kill()
    sys.stdout.flush()
    os._exit(0)


async def _work(settings: Settings, role: Role, worker_id: str, console: Console, started: list[Worker]) -> str | None:
    stop = Stop()
    stop.arm()

    def say_ready(worker: WorkerServer) -> None:
        started.append(worker.record)
        console.line(f"The worker {worker_id} is ready on {worker.record.address}")

    own = settings.worker
    return await run_worker(
        settings, role, worker_id, own.host, stop, say_ready, port=own.port, advertise_host=own.advertise_host
    )
