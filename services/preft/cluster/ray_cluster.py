"""Ray as the control plane: one actor per worker, placed, restarted after a crash, ended with the cluster.

An actor is a process that runs one `WorkerServer` in a thread with its own event loop. If the engine dies, the actor's
process ends, and Ray starts both again. A worker that is told to end drains first, and Ray kills what is left. Output
of Ray and the workers goes to files.
"""

from __future__ import annotations

import asyncio
import contextlib
import getpass
import logging
import math
import os
import shutil
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from pydantic import SecretStr
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from preft.cluster.local_ray import start_ray
from preft.cluster.logs import cause_in, output_to
from preft.cluster.process import Stop
from preft.cluster.secret import read_secret
from preft.cluster.sizing import check_gpus, has_gpu_build, worker_resources
from preft.cluster.worker_process import run_worker
from preft.core.background import Background
from preft.core.cluster import Role
from preft.core.errors import ConfigError
from preft.core.settings import Settings
from preft.worker.server import StartEngine, WorkerServer

logger = logging.getLogger(__name__)

START_ATTEMPTS = 3
REPLY_SECONDS = 1.0  # for an actor to report a failed start before its process ends
CHECK_SECONDS = 5.0
CLOSE_SECONDS = 5.0  # for a worker to close after its requests, until Ray kills it


class WorkerActor:
    """One worker under Ray. The constructor starts the worker, so a restarted actor is a restarted worker."""

    start_engine: type[StartEngine] = StartEngine

    def __init__(
        self,
        settings_json: str,
        secret: str,
        role: str,
        worker_id: str,
        host: str,
        state: str,
        log: str,
        folder: str,
    ) -> None:
        output_to(Path(log))
        end_with_main_thread()
        if folder:
            _use_folder(folder)
        self._log = Path(log)
        self._decided = threading.Event()  # set when the start has succeeded or failed
        self._failure: str | None = None
        self._stop = Stop()
        self._ended = threading.Event()  # set when the worker has drained and closed
        self._loop: asyncio.AbstractEventLoop | None = None  # set before `_decided`
        self._worker: WorkerServer | None = None
        host = host or ray.util.get_node_ip_address()
        settings = Settings.model_validate_json(settings_json)
        secrets = {"cluster_secret": SecretStr(secret), "state": SecretStr(state) if state else None}
        settings = settings.model_copy(update=secrets)
        thread = threading.Thread(
            target=self._run, args=(settings, Role(role), worker_id, host), name=worker_id, daemon=True
        )
        thread.start()

    def _run(self, settings: Settings, role: Role, worker_id: str, host: str) -> None:
        try:
            with asyncio.Runner() as runner:
                self._loop = runner.get_loop()
                engine = self.start_engine()
                reason = runner.run(run_worker(settings, role, worker_id, host, self._stop, self._started, engine))
                if reason is None:
                    self._ended.set()
                    threading.Event().wait()  # Ray would start a process that ends by itself again
            logger.error("worker %s ends: %s", worker_id, reason)
        except BaseException as error:
            logger.exception("worker %s ends", worker_id)
            if not self._decided.is_set():
                self._failure = cause_in(self._log) or f"{type(error).__name__}: {error}"
                self._decided.set()
                time.sleep(REPLY_SECONDS)
        os._exit(1)

    def _started(self, worker: WorkerServer) -> None:
        self._worker = worker
        self._decided.set()

    def drain(self, but: str) -> None:
        """Tells all routers but `but` to send nothing more. See `WorkerServer.drain`."""
        if self._worker is not None and self._loop is not None:
            self._loop.call_soon_threadsafe(self._worker.drain, but)

    def end(self, seconds: float) -> None:
        """Returns once the worker has ended: after its running requests, which have `seconds`."""
        for stop, wait in ((self._stop.asked, seconds), (self._stop.at_once, CLOSE_SECONDS)):
            if self._loop is not None and not self._ended.is_set():
                self._loop.call_soon_threadsafe(stop.set)
                self._ended.wait(wait)

    def wait_started(self) -> str | None:
        """Returns None once the worker serves, or the reason why it can't."""
        self._decided.wait()
        return self._failure


def _use_folder(folder: str) -> None:
    """Puts this process's temporary files and sockets into `folder`. PyTorch's compiled code stays elsewhere."""
    compiled = os.path.join(tempfile.gettempdir(), f"torchinductor_{getpass.getuser()}")  # PyTorch's default
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", compiled)
    os.environ["TMPDIR"] = tempfile.tempdir = folder


def end_with_main_thread() -> None:
    """Lets this process end at once when its main thread ends, as Ray's does after the death of `preft serve`.

    Python's own way to the end takes seconds. Meanwhile it refuses work for threads, so that calls to the worker would
    fail instead of breaking, and routers repeat only those that break.
    """
    threading._register_atexit(os._exit, 1)  # type: ignore[attr-defined]  # `atexit` itself comes after that refusal


class RayCluster:
    """All workers of one cluster. Each has a placement group of its own, which follows it if its node dies."""

    def __init__(self, settings: Settings, cluster_id: str, logs: Path) -> None:
        self._settings = settings
        self._prefix = f"{cluster_id}-"
        self._logs = logs
        self._folder: Path | None = None
        self._actors: dict[str, Any] = {}  # by worker id
        self._groups: dict[str, PlacementGroup] = {}
        self._secret = ""
        self._background = Background()
        self._watches: dict[str, asyncio.Task[None]] = {}
        self._added: set[str] = set()  # workers beyond those of the start
        self._numbers: Counter[Role] = Counter()  # of workers started so far
        self._ending: set[str] = set()
        self._tell: Callable[[str], None] = lambda text: None
        self._failed: asyncio.Future[str] | None = None
        self._drain_ends: float | None = None  # monotonic; None: no drain has begun

    def start(self) -> None:
        """Starts or joins Ray and starts all workers; returns while their engines load.

        Raises ConfigError, also if the workers need more GPUs than this machine has, or a machine of Ray needs `tls`.
        """
        ray_logger = logging.getLogger("ray")
        ray_logger.handlers.clear()  # Ray's handlers print
        ray_logger.propagate = True
        self._secret = read_secret(self._settings)
        address = self._settings.ray_address
        if address is None:
            self._folder = start_ray()
            # A cluster that exists already may add machines.
            check_gpus(self._settings, has_gpu_build(), ray.cluster_resources().get("GPU", 0.0))
        else:
            self._join(address)
        for role in self._settings.roles:
            for _ in range(self._settings.engine(role).replicas):
                name = self._name(role)
                key = self._prefix + name
                self._actors[key], self._groups[key] = self._start_worker(role, name)

    def _join(self, address: str) -> None:
        try:
            ray.init(address=address, log_to_driver=False, configure_logging=False)
        except (OSError, RuntimeError, ValueError) as error:
            raise ConfigError(f"ray_address: Ray at {address} can't be joined: {error}") from error
        hosts = [node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]]
        for host in hosts:
            self._settings.check_internal_host(host)
        if self._settings.state is None and len(hosts) > 1:
            raise ConfigError(
                f"state: Ray at {address} has several nodes, whose workers can't use a file of this machine: "
                "name a Redis server, such as redis://host:6379/0"
            )

    def _name(self, role: Role) -> str:
        name = f"{role.value}-{self._numbers[role]}"
        self._numbers[role] += 1
        return name

    def _start_worker(self, role: Role, name: str) -> tuple[Any, PlacementGroup]:
        """Makes Ray start a worker where there is room; returns at once."""
        settings, state = self._settings, self._settings.state
        bundle = worker_resources(settings, role, has_gpu_build())
        group = placement_group([bundle], name=self._prefix + name)
        custom = {key: count for key, count in bundle.items() if key not in ("CPU", "GPU")}
        actor = ray.remote(WorkerActor).options(
            num_cpus=bundle["CPU"],
            num_gpus=bundle["GPU"],
            resources=custom,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0),
            max_restarts=-1,
            max_concurrency=4,
        )
        started = actor.remote(
            settings.model_dump_json(),
            self._secret,
            role.value,
            self._prefix + name,
            "127.0.0.1" if settings.ray_address is None else "",
            state.get_secret_value() if state else "",
            str(self._log(name)),
            str(self._folder) if self._folder else "",
        )
        return started, group

    def members(self, *roles: Role) -> list[str]:
        """Ids of the workers of these roles, without those that end."""
        begins = tuple(f"{self._prefix}{role.value}-" for role in roles)
        return [key for key in self._actors if key.startswith(begins) and key not in self._ending]

    async def room(self, role: Role) -> int:
        """How many workers all nodes of Ray together have room for, by the custom resources of the role."""
        needs = self._settings.engine(role).resources
        nodes, draining = await asyncio.to_thread(ray.nodes), await asyncio.to_thread(_draining_nodes)
        stay = [node["Resources"] for node in nodes if node["Alive"] and node["NodeID"] not in draining]
        return sum(int(min(node.get(key, 0.0) / need for key, need in needs.items())) for node in stay)

    async def leaving(self) -> dict[str, float]:
        """The workers on nodes that Ray drains, without those that end: the seconds that each node has left."""
        draining = await asyncio.to_thread(_draining_nodes)
        if not draining:
            return {}
        table = await asyncio.to_thread(placement_group_table)
        found = {}
        for worker_id, group in self._groups.items():
            nodes = table.get(group.id.hex(), {}).get("bundles_to_node_id", {}).values()
            left = [draining[node] for node in nodes if node in draining]
            if left and worker_id not in self._ending:
                found[worker_id] = min(left)
        return found

    async def add(self, role: Role) -> str:
        """Starts one more worker, and returns its id while its engine loads."""
        name = self._name(role)
        worker_id = self._prefix + name
        self._actors[worker_id], self._groups[worker_id] = await asyncio.to_thread(self._start_worker, role, name)
        self._added.add(worker_id)
        self._watch(worker_id)
        return worker_id

    async def remove(self, worker_id: str) -> None:
        """Ends a worker after its running requests, which have `shutdown_timeout`."""
        self._ending.add(worker_id)
        self._watches.pop(worker_id).cancel()
        seconds = self._settings.shutdown_timeout
        with contextlib.suppress(ray.exceptions.RayError, TimeoutError):
            async with asyncio.timeout(seconds + CLOSE_SECONDS + REPLY_SECONDS):  # it may not have begun
                await self._actors[worker_id].end.remote(seconds)
        self._ending.discard(worker_id)
        self._added.discard(worker_id)
        await asyncio.to_thread(_kill, self._actors.pop(worker_id), self._groups.pop(worker_id))

    def _log(self, name: str) -> Path:
        return self._logs / f"{name}.log"

    async def wait_failed(self, tell: Callable[[str], None]) -> str:
        """Returns the reason once a worker's start has failed START_ATTEMPTS times in a row.

        Calls `tell` for each failed start.
        """
        self._tell, self._failed = tell, asyncio.get_running_loop().create_future()
        for worker_id in self._actors:
            self._watch(worker_id)
        without: dict[str, bool] = {}
        self._background.every(CHECK_SECONDS, lambda: self._tell_room(without), "workers without room aren't told of")
        try:
            return await self._failed
        finally:
            await self._background.close()

    def _watch(self, worker_id: str) -> None:
        self._watches[worker_id] = self._background.start(self._wait_failed(worker_id), f"the watch of {worker_id}")

    async def _tell_room(self, without: dict[str, bool]) -> None:
        """Tells of each worker that no node of the Ray cluster has room for, once until the worker has a node.

        `without` has the workers that lacked room at the last look, and whether they had been told of.
        """
        table = await asyncio.to_thread(placement_group_table)
        states = {key: table.get(group.id.hex(), {}).get("state") for key, group in self._groups.items()}
        lacking = [key for key, state in states.items() if state in ("PENDING", "RESCHEDULING")]
        for key in lacking:
            if without.get(key) is False:  # for two looks
                bundle = self._groups[key].bundle_specs[0].items()
                needs = ", ".join(f"{count:g} {what}" for what, count in bundle)
                name = key.removeprefix(self._prefix)
                self._tell(f"  {name}: it waits for a node of the Ray cluster with {needs}")
        told = {key: key in without for key in lacking}
        without.clear()
        without.update(told)

    async def _wait_failed(self, worker_id: str) -> None:
        actor, name = self._actors[worker_id], worker_id.removeprefix(self._prefix)
        failures = 0
        while True:
            try:
                failure = await actor.wait_started.remote()
            except ray.exceptions.RayError:  # the process ended without a report, or Ray is about to restart it
                failure = None
            else:
                failures = failures + 1 if failure else 0
            if failure:
                self._tell(f"  {name}: it couldn't be started ({failures} of {START_ATTEMPTS} attempts): {failure}")
            if failures == START_ATTEMPTS and worker_id in self._added:  # the others serve without it
                self._tell(f"  {name}: it is given up; its log is {self._log(name)}")
                self._background.start(self.remove(worker_id), f"{worker_id} is not ended")
                return
            if failures == START_ATTEMPTS and self._failed is not None and not self._failed.done():
                self._failed.set_result(
                    f"the worker {name} couldn't be started, several times in a row: {failure}; "
                    f"its log is {self._log(name)}"
                )
                return
            await asyncio.sleep(2 * REPLY_SECONDS if failure else CHECK_SECONDS)  # until Ray has noticed the end

    def drain(self, but: str) -> None:
        """Begins the workers' `shutdown_timeout`. All routers but `but`, this process's own, send nothing more."""
        self._drain_ends = time.monotonic() + self._settings.shutdown_timeout
        for actor in self._actors.values():
            actor.drain.remote(but)

    async def end(self, at_once: asyncio.Event) -> None:
        """Waits until the drained workers have finished and closed, for the rest of the time, or until `at_once`."""
        if self._drain_ends is None or at_once.is_set():
            return
        left = max(0.0, self._drain_ends - time.monotonic())
        hurry = asyncio.create_task(at_once.wait())
        ends = asyncio.create_task(self._end_all(left))
        await asyncio.wait(
            {ends, hurry}, timeout=left + CLOSE_SECONDS + REPLY_SECONDS, return_when=asyncio.FIRST_COMPLETED
        )
        for task in (ends, hurry):
            task.cancel()
        await asyncio.gather(ends, hurry, return_exceptions=True)

    async def _end_all(self, seconds: float) -> None:
        await asyncio.gather(*(actor.end.remote(seconds) for actor in self._actors.values()), return_exceptions=True)

    def close(self) -> None:
        """Kills what is left of the workers, and ends Ray if this process started it."""
        for key, actor in self._actors.items():
            # This process's Ray ends with its groups. If it has been killed, the removal of one would take a minute.
            _kill(actor, self._groups[key] if self._folder is None else None)
        ray.shutdown()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


def _draining_nodes() -> dict[str, float]:
    """Ids of the nodes that Ray drains, with the seconds until each one's deadline; infinity: it has none.

    Ray drains a node at `ray drain-node`, and at SIGTERM to its `ray start --block`. Ray has no public call for this.
    """
    deadlines = ray._private.state.state.get_draining_nodes()  # in ms since 1970, or 0
    return {node: end / 1000 - time.time() if end else math.inf for node, end in deadlines.items()}


def _kill(actor: Any, group: PlacementGroup | None) -> None:
    with contextlib.suppress(ray.exceptions.RayError):
        ray.kill(actor)
        if group is not None:
            remove_placement_group(group)
