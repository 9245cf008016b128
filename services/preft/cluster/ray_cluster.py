"""Ray as the control plane: one actor per worker, placed, restarted when dead, ended with the cluster.

The only module that imports ray.

An actor is a process that runs one `WorkerServer` in a thread with its own event loop. When the engine dies the actor's
process ends too, so that Ray starts both anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
import time
from pathlib import Path
from typing import Any

import ray
from pydantic import SecretStr

from preft.cluster.secret import read_secret
from preft.cluster.worker import run_worker
from preft.core.cluster import Role
from preft.core.settings import Settings
from preft.state import open_store

logger = logging.getLogger(__name__)

LOCAL_NODE_IP = "127.0.0.2"  # Ray replaces 127.0.0.1 by the machine's outside address, but not this one
START_ATTEMPTS = 3
REPLY_SECONDS = 1.0  # for an actor that failed to say so before it ends
CHECK_SECONDS = 5.0
OBJECT_STORE_BYTES = 80 << 20  # Ray's minimum: no tensor goes through it


class WorkerActor:
    """One worker under Ray. The constructor starts it, so that a restarted actor is a restarted worker."""

    def __init__(self, settings_json: str, secret: str, role: str, worker_id: str, host: str, store_url: str) -> None:
        self._decided = threading.Event()  # whether it starts or not
        self._failure: str | None = None
        host = host or ray.util.get_node_ip_address()
        os.environ["VLLM_HOST_IP"] = host
        settings = Settings.model_validate_json(settings_json)
        settings = settings.model_copy(update={"cluster_secret": SecretStr(secret)})
        thread = threading.Thread(
            target=self._run, args=(settings, Role(role), worker_id, host, store_url), name=worker_id, daemon=True
        )
        thread.start()

    def _run(self, settings: Settings, role: Role, worker_id: str, host: str, store_url: str) -> None:
        async def main() -> str:
            return await run_worker(settings, role, worker_id, host, open_store(store_url), self._decided.set)

        try:
            reason = asyncio.run(main())
            logger.error("worker %s ends: %s", worker_id, reason)
        except BaseException as error:
            logger.exception("worker %s ends", worker_id)
            if not self._decided.is_set():
                self._failure = f"{type(error).__name__}: {error}"
                self._decided.set()
                time.sleep(REPLY_SECONDS)
        os._exit(1)

    def wait_started(self) -> str | None:
        """Returns once the worker serves (None) or can't (why)."""
        self._decided.wait()
        return self._failure


class RayCluster:
    """All workers of one cluster."""

    def __init__(self, settings: Settings, cluster_id: str, store_path: Path) -> None:
        self._settings = settings
        self._cluster_id = cluster_id
        self._store_url = str(store_path)
        self._actors: list[Any] = []

    def start(self) -> None:
        """Starts Ray (or joins it) and all workers; returns while their engines still load."""
        address, secret = self._settings.ray_address, read_secret(self._settings)
        local = address is None
        if local:
            ray.init(
                address="local",
                include_dashboard=False,
                _node_ip_address=LOCAL_NODE_IP,
                object_store_memory=OBJECT_STORE_BYTES,
                _system_config={"worker_niceness": 0},  # Ray's 15 starves engines beside anything else that runs
                log_to_driver=True,
                configure_logging=False,
            )
        else:
            ray.init(address=address, log_to_driver=True, configure_logging=False)
        for role in self._settings.roles:
            own = self._settings.engine(role)
            actor = ray.remote(WorkerActor).options(
                num_cpus=own.num_cpus, num_gpus=own.num_gpus, max_restarts=-1, max_concurrency=2
            )
            for number in range(own.replicas):
                worker_id = f"{self._cluster_id}-{role.value}-{number}"
                host = "127.0.0.1" if local else ""
                self._actors.append(
                    actor.remote(self._settings.model_dump_json(), secret, role.value, worker_id, host, self._store_url)
                )

    async def wait_failed(self) -> str:
        """Returns, with the reason, when a worker couldn't be started START_ATTEMPTS times in a row."""
        watches = [asyncio.create_task(self._wait_failed(actor)) for actor in self._actors]
        try:
            done, _ = await asyncio.wait(watches, return_when=asyncio.FIRST_COMPLETED)
            return done.pop().result()
        finally:
            for watch in watches:
                watch.cancel()

    async def _wait_failed(self, actor: Any) -> str:
        failures: list[str] = []
        while len(failures) < START_ATTEMPTS:
            try:
                failure = await actor.wait_started.remote()
            except ray.exceptions.RayError:  # it ended without a word, or Ray is about to start it again
                failure = None
            else:
                failures = [*failures, failure] if failure else []
            await asyncio.sleep(2 * REPLY_SECONDS if failure else CHECK_SECONDS)  # until Ray has seen its end
        return failures[-1]

    def close(self) -> None:
        """Ends every worker and, if it is ours, Ray."""
        for actor in self._actors:
            with contextlib.suppress(ray.exceptions.RayError):
                ray.kill(actor)
        ray.shutdown()
