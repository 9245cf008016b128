"""What the cluster is made of, as the router sees it: workers with capacity and load, adapters, a snapshot of both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class Role(StrEnum):
    """What a worker does: one half of each request, or all of it."""

    PREFILL = "prefill"
    DECODE = "decode"
    COLOCATED = "colocated"


class WorkerState(StrEnum):
    """STARTING: engine loads. READY: takes requests. DRAINING: finishes what it has. DEAD: silent too long, or gone."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    DEAD = "dead"


@dataclass(frozen=True, slots=True)
class WorkerLoad:
    """A worker's own view of its use at one heartbeat. Bytes in bytes, blocks in KV blocks.

    `kv_blocks_total` excludes the engine's reserved null block: an idle worker has `kv_blocks_free == kv_blocks_total`.
    """

    running: int = 0
    kv_blocks_total: int = 0
    kv_blocks_free: int = 0
    staging_bytes_total: int = 0
    staging_bytes_used: int = 0
    open_handles: int = 0
    preemptions: int = 0
    adapters: tuple[str, ...] = ()  # digests resident in engine slots or host cache, most recently used last


@dataclass(frozen=True, slots=True)
class Worker:
    """One worker as registered in the state store. `address` is `host:port` of its gRPC services.

    `fingerprint` names model, dtype, KV layout, block size and attention backend: KV moves only between equal ones. A
    colocated worker's is its own alone: its KV moves nowhere.
    `heartbeat` is in `time.time()` seconds.
    """

    id: str
    role: Role
    state: WorkerState
    address: str
    fingerprint: str
    pid: int
    engine_pids: tuple[int, ...] = ()
    block_size: int = 16
    max_model_len: int = 0
    max_num_seqs: int = 0
    heartbeat: float = 0.0
    load: WorkerLoad = field(default_factory=WorkerLoad)


@dataclass(frozen=True, slots=True)
class Adapter:
    """One catalog entry: the version (digest) that `name` points to now, and where its verified copy lies.

    `kind` is "lora", "reft" or "lora+reft"; `rank` the highest in it; `prefill_only` whether its configuration says
    that it was trained for the prompt pass alone.
    """

    name: str
    digest: str
    path: str
    source: str
    rank: int
    kind: str = "lora"
    prefill_only: bool = False
    created: float = 0.0


@dataclass(frozen=True, slots=True)
class ClusterSnapshot:
    """A consistent picture for one routing decision."""

    workers: Mapping[str, Worker]
    taken: float

    def ready(self, *roles: Role) -> tuple[Worker, ...]:
        """Workers of these roles that take requests, ordered by id."""
        return tuple(
            worker
            for _, worker in sorted(self.workers.items())
            if worker.role in roles and worker.state is WorkerState.READY
        )
