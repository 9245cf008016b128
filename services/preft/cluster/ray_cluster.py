"""Ray as the control plane: one actor per worker, placed, restarted after a crash, ended with the cluster.

`RayCluster` starts the workers, or adopts those that an earlier `preft serve` has left, and ends them. `worker_actor`
is what runs in each worker's process, `ray_workers` owns the calls to Ray. Output of Ray goes to files.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import ray
from ray.util.placement_group import placement_group_table

from preft.cluster.local_ray import start_ray
from preft.cluster.ray_workers import (
    RayWorker,
    draining_nodes,
    find_workers,
    log_of,
    namespace_of,
    other_server,
    start_digest,
    start_worker,
)
from preft.cluster.secret import read_secret
from preft.cluster.sizing import check_gpus, has_gpu_build, worker_resources
from preft.cluster.worker_actor import CLOSE_SECONDS, REPLY_SECONDS, WorkerActor
from preft.core.background import Background
from preft.core.cluster import Role
from preft.core.errors import ConfigError
from preft.core.settings import Settings

logger = logging.getLogger(__name__)

START_ATTEMPTS = 3
CHECK_SECONDS = 5.0
OTHER_SECONDS = 120.0  # for Ray to notice the death of an earlier `preft serve`, also with its machine


class RayCluster:
    """All workers of one cluster. Each has a placement group of its own, which follows it if its node dies."""

    def __init__(self, settings: Settings, cluster_id: str, logs: Path, tell: Callable[[str], None]) -> None:
        """Calls `tell` for each event of a worker. `cluster_id` is that of workers that no one has started yet."""
        self._settings = settings
        self._id = cluster_id
        self._logs = logs
        self._tell = tell
        self._folder: Path | None = None
        self._workers: dict[str, RayWorker] = {}  # by id
        self._namespace = namespace_of(settings) or ""
        self._secret = ""
        self._starts: dict[Role, str] = {}  # digests of what workers are started with
        self._background = Background()
        self._watches: dict[str, asyncio.Task[None]] = {}
        self._adopted: set[str] = set()
        self._added: set[str] = set()  # workers beyond those of the start
        self._numbers: Counter[Role] = Counter()  # of the next worker
        self._ending: set[str] = set()
        self._failed: asyncio.Future[str] | None = None
        self._drain_ends: float | None = None  # monotonic; None: no drain has begun

    @property
    def id(self) -> str:
        """The beginning of all workers' ids. Known after `start`: adopted workers keep theirs."""
        return self._id

    def start(self, is_stopped: Callable[[], bool] = lambda: False) -> None:
        """Starts or joins Ray, adopts the workers that run, and starts the others; returns while their engines load.

        Starts none if `is_stopped` while it waits for the end of an earlier `preft serve`.

        Raises ConfigError, also if another `preft serve` has the workers, if the workers need more GPUs than this
        machine has, or if a machine of Ray needs `tls`.
        """
        ray_logger = logging.getLogger("ray")
        ray_logger.handlers.clear()  # Ray's handlers print
        ray_logger.propagate = True
        self._secret = read_secret(self._settings)
        self._starts = {role: start_digest(self._settings, self._secret, role) for role in self._settings.roles}
        address = self._settings.ray_address
        if address is None:
            self._folder = start_ray()
            # A cluster that exists already may add machines.
            check_gpus(self._settings, has_gpu_build(), ray.cluster_resources().get("GPU", 0.0))
        else:
            self._join(address)
        if self._namespace:
            self._wait_alone(is_stopped)
            if is_stopped():
                return
            self._adopt()
        for role in self._settings.roles:
            for _ in range(self._settings.engine(role).replicas - len(self.members(role))):
                worker = self._start_worker(role, self._next_name(role))
                self._workers[worker.id] = worker

    def _join(self, address: str) -> None:
        try:
            ray.init(address=address, namespace=self._namespace or None, log_to_driver=False, configure_logging=False)
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

    def _wait_alone(self, is_stopped: Callable[[], bool]) -> None:
        """Waits until no earlier `preft serve` has the workers: Ray may not have noticed its death yet."""
        end = time.monotonic() + OTHER_SECONDS
        is_said = False
        while (other := other_server(self._namespace)) is not None and not is_stopped():
            if time.monotonic() > end:
                raise ConfigError(
                    f"ray_address: another `preft serve` ({other}) has the workers of this model and `state` on this "
                    "Ray: end it first, or use a `state` of its own for each"
                )
            if not is_said:
                is_said = True
                self._tell(f"waiting for the end of another `preft serve` ({other})")
            time.sleep(REPLY_SECONDS)

    def _adopt(self) -> None:
        """Takes over the workers that an earlier `preft serve` has left, with their ids."""
        for worker in find_workers(self._namespace):
            self._id = worker.id.partition("-")[0]
            self._workers[worker.id] = worker
            self._adopted.add(worker.id)
            self._numbers[worker.role] = worker.number + 1
        for role in self._settings.roles:
            self._added |= set(self.members(role)[self._settings.engine(role).replicas :])
        if self._adopted:
            self._tell(f"{len(self._adopted)} workers of an earlier `preft serve` run, and are adopted")

    def _next_name(self, role: Role) -> str:
        name = f"{role.value}-{self._numbers[role]}"
        self._numbers[role] += 1
        return name

    def _start_worker(self, role: Role, name: str) -> RayWorker:
        """Makes Ray start a worker where there is room; returns at once."""
        settings, state = self._settings, self._settings.state
        worker_id = f"{self._id}-{name}"
        arguments = (
            settings.model_dump_json(),
            self._secret,
            role.value,
            worker_id,
            "127.0.0.1" if settings.ray_address is None else "",
            state.get_secret_value() if state else "",
            str(self._logs / f"{name}.log"),
            str(self._folder) if self._folder else "",
        )
        bundle = worker_resources(settings, role, has_gpu_build())
        ray_name = (self._namespace, worker_id, self._starts[role], self._logs.name)
        return start_worker(WorkerActor, arguments, bundle, ray_name)

    def members(self, *roles: Role) -> list[str]:
        """Ids of the workers of these roles, without those that end."""
        return [key for key, one in self._workers.items() if one.role in roles and key not in self._ending]

    def outdated(self, role: Role) -> list[str]:
        """Ids of the adopted workers of the role that new ones would differ from, without those that end."""
        members = (self._workers[one] for one in self.members(role))
        return [one.id for one in members if one.start != self._starts[role]]

    async def room(self, role: Role) -> int:
        """How many workers all nodes of Ray together have room for, by the custom resources of the role."""
        needs = self._settings.engine(role).resources
        nodes, draining = await asyncio.to_thread(ray.nodes), await asyncio.to_thread(draining_nodes)
        stay = [node["Resources"] for node in nodes if node["Alive"] and node["NodeID"] not in draining]
        return sum(int(min(node.get(key, 0.0) / need for key, need in needs.items())) for node in stay)

    async def leaving(self) -> dict[str, float]:
        """The workers on nodes that Ray drains, without those that end: the seconds that each node has left."""
        draining = await asyncio.to_thread(draining_nodes)
        if not draining:
            return {}
        table = await asyncio.to_thread(placement_group_table)
        found = {}
        for worker_id, worker in self._workers.items():
            nodes = table.get(worker.group.id.hex(), {}).get("bundles_to_node_id", {}).values()
            left = [draining[node] for node in nodes if node in draining]
            if left and worker_id not in self._ending:
                found[worker_id] = min(left)
        return found

    async def add(self, role: Role) -> str:
        """Starts one more worker, and returns its id while its engine loads."""
        worker = await asyncio.to_thread(self._start_worker, role, self._next_name(role))
        self._workers[worker.id] = worker
        self._added.add(worker.id)
        self._watch(worker.id)
        return worker.id

    async def remove(self, worker_id: str) -> None:
        """Ends a worker after its running requests, which have `shutdown_timeout`."""
        self._ending.add(worker_id)
        self._watches.pop(worker_id).cancel()
        seconds = self._settings.shutdown_timeout
        with contextlib.suppress(ray.exceptions.RayError, TimeoutError):
            async with asyncio.timeout(seconds + CLOSE_SECONDS + REPLY_SECONDS):  # it may not have begun
                await self._workers[worker_id].actor.end.remote(seconds)
        self._ending.discard(worker_id)
        for known in (self._added, self._adopted):
            known.discard(worker_id)
        await asyncio.to_thread(self._workers.pop(worker_id).kill)

    async def wait_failed(self) -> str:
        """Returns the reason once a worker's start has failed START_ATTEMPTS times in a row."""
        self._failed = asyncio.get_running_loop().create_future()
        for worker_id in self._workers:
            self._watch(worker_id)
        for worker_id in self._adopted:
            self._background.start(self._check_adopted(worker_id), f"{worker_id} is not checked")
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
        states = {key: table.get(one.group.id.hex(), {}).get("state") for key, one in self._workers.items()}
        lacking = [key for key, state in states.items() if state in ("PENDING", "RESCHEDULING")]
        for key in lacking:
            if without.get(key) is False:  # for two looks
                bundle = self._workers[key].group.bundle_specs[0].items()
                needs = ", ".join(f"{count:g} {what}" for what, count in bundle)
                name = _name(key)
                self._tell(f"  {name}: it waits for a node of the Ray cluster with {needs}")
        told = {key: key in without for key in lacking}
        without.clear()
        without.update(told)

    async def _check_adopted(self, worker_id: str) -> None:
        """Ends an adopted worker that is one too many; replaces one that was told to end, and won't serve again."""
        worker, engine = self._workers[worker_id], self._settings.engine(self._workers[worker_id].role)
        most = 0 if worker.role not in self._settings.roles else max(engine.replicas, engine.max_replicas or 0)
        if not (engine.fill_nodes and most) and worker_id not in self.members(worker.role)[:most]:
            self._tell(f"  {_name(worker_id)}: it is one too many")
            await self.remove(worker_id)
            return
        is_ending = False
        with contextlib.suppress(ray.exceptions.RayError):  # a process that starts again hasn't been told
            is_ending = await worker.actor.is_ending.remote()
        if is_ending and worker_id in self.members(worker.role):
            self._ending.add(worker_id)
            self._tell(f"  {_name(worker_id)}: it was told to end, and is replaced")
            await self.add(worker.role)
            await self.remove(worker_id)

    async def _wait_failed(self, worker_id: str) -> None:
        worker, name = self._workers[worker_id], _name(worker_id)
        log = log_of(self._logs.parent, worker)
        failures = 0
        while True:
            try:
                failure = await worker.actor.wait_started.remote()
            except ray.exceptions.RayError:  # the process ended without a report, or Ray is about to restart it
                failure = None
            else:
                failures = failures + 1 if failure else 0
            if failure:
                self._tell(f"  {name}: it couldn't be started ({failures} of {START_ATTEMPTS} attempts): {failure}")
            if failures == START_ATTEMPTS and worker_id in self._added:  # the others serve without it
                self._tell(f"  {name}: it is given up; its log is {log}")
                self._background.start(self.remove(worker_id), f"{worker_id} is not ended")
                return
            if failures == START_ATTEMPTS and self._failed is not None and not self._failed.done():
                self._failed.set_result(
                    f"the worker {name} couldn't be started, several times in a row: {failure}; its log is {log}"
                )
                return
            await asyncio.sleep(2 * REPLY_SECONDS if failure else CHECK_SECONDS)  # until Ray has noticed the end

    def drain(self, but: str) -> None:
        """Begins the workers' `shutdown_timeout`. All routers but `but`, this process's own, send nothing more."""
        self._drain_ends = time.monotonic() + self._settings.shutdown_timeout
        for worker in self._workers.values():
            worker.actor.drain.remote(but)

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
        ends = (worker.actor.end.remote(seconds) for worker in self._workers.values())
        await asyncio.gather(*ends, return_exceptions=True)

    def close(self) -> None:
        """Kills what is left of the workers, and ends Ray if this process started it."""
        for worker in self._workers.values():
            # This process's Ray ends with its groups. If it has been killed, the removal of one would take a minute.
            worker.kill(with_group=self._folder is None)
        ray.shutdown()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


def _name(worker_id: str) -> str:
    return worker_id.partition("-")[2]
