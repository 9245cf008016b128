"""The workers of one cluster as Ray keeps them: an actor and a placement group each, which outlive `preft serve`.

Where `preft serve` joins a running Ray with a store that other processes use too, Ray keeps the workers after its
death, in a namespace that is the same for all `preft serve` of one base model and one store. The next one finds them by
their names. Owns the names and the calls to Ray; `ray_cluster` owns what happens to the workers.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.core.generated.gcs_pb2 import JobTableData
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

import preft
from preft.cluster.model import model_identity
from preft.core.cluster import Role
from preft.core.settings import RouterSettings, Settings
from preft.state import shown

logger = logging.getLogger(__name__)

CALLS = 16  # at once to one actor: a `preft serve` that was killed may leave some that wait for the engine's start
GATEWAY_ONLY = (
    "served_model_name",
    "port",
    "allowed_origins",
    "grpc_port",
    "peer_host",
    "ray_address",
    "scaling",
    "worker",
)
OF_ROUTERS = RouterSettings.model_fields.keys() - {"poll_interval", "transfer_timeout"}  # workers use these two
NUMBERS = {"replicas", "max_replicas", "fill_nodes"}  # of workers


@dataclass(frozen=True, slots=True)
class RayWorker:
    """`start` is the digest of what the worker was started with, `run` the name of its log files' folder."""

    id: str
    start: str
    run: str
    actor: Any
    group: PlacementGroup

    @property
    def role(self) -> Role:
        return Role(self.id.split("-")[1])

    @property
    def number(self) -> int:
        return int(self.id.split("-")[2])

    def kill(self, *, with_group: bool = True) -> None:
        with contextlib.suppress(ray.exceptions.RayError):
            ray.kill(self.actor)
            if with_group:
                remove_placement_group(self.group)


def namespace_of(settings: Settings) -> str | None:
    """Ray's namespace of the workers that outlive this process; None if they end with it.

    Without the setting `state`, no other process can use them.
    """
    if settings.ray_address is None or settings.state is None:
        return None
    place = f"{shown(settings.state.get_secret_value())} {model_identity(settings.model)}"
    return f"preft-{hashlib.sha256(place.encode()).hexdigest()[:16]}"


def start_digest(settings: Settings, secret: str, role: Role) -> str:
    """Stands for all that a worker of the role is started with: the settings that concern it, secrets, version."""
    left_out: dict[str, Any] = {**dict.fromkeys(GATEWAY_ONLY, True), "router": set(OF_ROUTERS)}
    own, other = ("decode", "prefill") if role is Role.DECODE else ("prefill", "decode")
    left_out |= {own: NUMBERS, other: True}
    state = settings.state.get_secret_value() if settings.state else ""
    parts = [preft.__version__, role.value, settings.model_dump_json(exclude=left_out), secret, state]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:8]


def start_worker(
    actor_class: type, arguments: tuple[str, ...], bundle: dict[str, float], name: tuple[str, str, str, str]
) -> RayWorker:
    """Makes Ray start a worker where there is room for `bundle`; returns at once.

    `name` is the namespace ("": the worker ends with this process), the worker's id, its digest and its run.
    """
    namespace, worker_id, start, run = name
    ray_name = ":".join(name)
    lifetime = "detached" if namespace else None
    group = placement_group([bundle], name=ray_name, lifetime=lifetime)
    custom = {key: count for key, count in bundle.items() if key not in ("CPU", "GPU")}
    actor = ray.remote(actor_class).options(
        name=ray_name if namespace else None,
        lifetime=lifetime,
        num_cpus=bundle["CPU"],
        num_gpus=bundle["GPU"],
        resources=custom,
        scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0),
        max_restarts=-1,
        max_concurrency=CALLS,
    )
    return RayWorker(worker_id, start, run, actor.remote(*arguments), group)


def find_workers(namespace: str) -> list[RayWorker]:
    """The workers that an earlier `preft serve` has left in this process's namespace, in order.

    Ends what is no whole worker: an actor without its group, or a group without its actor.
    """
    actors = set(ray.util.list_named_actors())
    groups = {
        one["name"]: PlacementGroup(ray.PlacementGroupID(bytes.fromhex(key)))
        for key, one in placement_group_table().items()
        if one["state"] != "REMOVED" and one["name"].startswith(f"{namespace}:")
    }
    found = []
    for name in actors | groups.keys():
        actor = None
        with contextlib.suppress(ValueError):  # it has just ended
            actor = ray.get_actor(name) if name in actors else None
        if actor is not None and name in groups:
            _, worker_id, start, run = name.split(":")
            found.append(RayWorker(worker_id, start, run, actor, groups[name]))
        elif actor is not None:
            ray.kill(actor)
        elif name in groups:
            remove_placement_group(groups[name])
    return sorted(found, key=lambda one: (one.role, one.number))


def other_server(namespace: str) -> str | None:
    """The process and the address of an earlier `preft serve` of the namespace that lives, as Ray knows it.

    Ray has no public call for the namespaces of its jobs. A job's id is higher than those of earlier jobs.
    """
    accessor = ray._private.state.state._connect_and_get_accessor()
    table = accessor.get_job_table(skip_submission_job_info_field=True, skip_is_running_tasks_field=True)
    own = ray.JobID.from_hex(ray.get_runtime_context().get_job_id()).int()
    for job in map(JobTableData.FromString, table):
        if job.config.ray_namespace == namespace and not job.is_dead and ray.JobID(job.job_id).int() < own:
            return f"process {job.driver_pid} on {job.driver_address.ip_address}"
    return None


def draining_nodes() -> dict[str, float]:
    """Ids of the nodes that Ray drains, with the seconds until each one's deadline; infinity: it has none.

    Ray drains a node at `ray drain-node`, and at SIGTERM to its `ray start --block`. Ray has no public call for this.
    """
    deadlines = ray._private.state.state.get_draining_nodes()  # in ms since 1970, or 0
    return {node: end / 1000 - time.time() if end else math.inf for node, end in deadlines.items()}


def log_of(logs: Path, worker: RayWorker) -> Path:
    """The worker's log file; `logs` is the folder of all runs."""
    return logs / worker.run / f"{worker.id.partition('-')[2]}.log"
