"""The cluster as the router sees it: workers with capacity and load, adapters, and a snapshot of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any


class Role(StrEnum):
    """The part of each request that a worker does: prefill, decode, or both."""

    PREFILL = "prefill"
    DECODE = "decode"
    COLOCATED = "colocated"


class Tier(StrEnum):
    """The nearest place of an adapter: an engine slot (and host memory), host memory (and disk), or disk."""

    SLOT = "slot"
    HOST = "host"
    DISK = "disk"
    SOURCE = "source"  # not on this worker


class WorkerState(StrEnum):
    """STARTING: engine loads. READY: takes requests. DRAINING: finishes requests. DEAD: ended or silent too long."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    DEAD = "dead"


@dataclass(frozen=True, slots=True)
class AdapterLoad:
    """Contents of a worker's adapter tiers, and totals since its start.

    `hits` counts requests by the tier in which they found their adapter. `loads` and `load_seconds` measure loads into
    host memory, from disk or from the source. `host_bytes` includes loads under way. `disk_bytes` is the whole
    machine's figure at this worker's last write to disk.
    """

    slots: int = 0
    slots_used: int = 0
    host_adapters: int = 0
    host_bytes: int = 0
    host_bytes_total: int = 0
    disk_bytes: int = 0
    host_evictions: int = 0
    disk_evictions: int = 0
    hits: Mapping[Tier, int] = field(default_factory=dict)
    loads: Mapping[Tier, int] = field(default_factory=dict)
    load_seconds: Mapping[Tier, float] = field(default_factory=dict)


REGION_BYTES = 128  # a staging region's header, seal and rounding
BY_TIER = ("hits", "loads", "load_seconds")  # fields of AdapterLoad


@dataclass(frozen=True, slots=True)
class WorkerLoad:
    """A worker's own view of its use at one heartbeat.

    `kv_blocks_total` excludes the engine's reserved null block: an idle worker has `kv_blocks_free == kv_blocks_total`.
    """

    running: int = 0
    kv_blocks_total: int = 0
    kv_blocks_free: int = 0
    staging_bytes_total: int = 0
    staging_bytes_used: int = 0
    staging_bytes_evictable: int = 0  # part of the used bytes: copies that new KV may replace
    open_handles: int = 0
    preemptions: int = 0
    adapters: tuple[str, ...] = ()  # digests in host memory, at most 1,024, most recently used last
    tiers: AdapterLoad = field(default_factory=AdapterLoad)


@dataclass(frozen=True, slots=True)
class Worker:
    """One worker as registered in the state store. `address` is `host:port` of its gRPC services.

    `fingerprint` names model, dtype, KV layout, block size and attention backend: KV moves only between equal
    fingerprints. A colocated worker's fingerprint is unique: its KV moves nowhere. `heartbeat` is in `time.time()`
    seconds of the worker's clock. Clocks may disagree, so the router only checks that it changes.
    """

    id: str
    role: Role
    state: WorkerState
    address: str
    fingerprint: str
    pid: int
    engine_pids: tuple[int, ...] = ()
    block_size: int = 16
    block_bytes: int = 0  # one KV block over all layers; 0 if its KV moves nowhere
    max_model_len: int = 0
    max_num_seqs: int = 0
    adapter_slots: int = 0  # distinct adapters in one engine batch
    heartbeat: float = 0.0
    load: WorkerLoad = field(default_factory=WorkerLoad)

    def blocks(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    def staging_bytes(self, tokens: int) -> int:
        """Bytes of staging memory for the KV of a prompt of `tokens` tokens."""
        return self.blocks(tokens) * self.block_bytes + REGION_BYTES if self.block_bytes else 0


def worker_row(worker: Worker, now: float) -> dict[str, Any]:
    """A worker as `/v1/workers` and `preft status --json` show it. `now` in `time.time()` seconds."""
    return {**asdict(worker), "seconds_since_heartbeat": round(max(0.0, now - worker.heartbeat), 1)}


@dataclass(frozen=True, slots=True)
class Adapter:
    """One catalog entry: the version (digest) that `name` points to now, and the source of its content.

    `kind` is "lora", "reft" or "lora+reft"; `rank` is the highest rank in it; `size` is in bytes. `prefill_only` is
    true if the adapter's configuration says that it was trained for the prompt pass alone. `version` counts the name's
    contents from 1 on. A pinned adapter stays in the host memory of every prefill worker. `stamp` is
    `AdapterSource.stamp` at the time of reading. `warnings` were shown to the user when the adapter was added.
    """

    name: str
    digest: str
    source: str
    rank: int
    kind: str = "lora"
    prefill_only: bool = False
    created: float = 0.0
    size: int = 0
    version: int = 1
    pinned: bool = False
    stamp: str = ""
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class AdapterPlace:
    """The nearest tier in which one worker has an adapter. `last_used` in `time.time()` seconds, 0 if never used there.

    `users` counts the requests that use the adapter now.
    """

    worker_id: str
    tier: Tier
    last_used: float = 0.0
    users: int = 0


@dataclass(frozen=True, slots=True)
class ClusterSnapshot:
    """A consistent view for one routing decision."""

    workers: Mapping[str, Worker]

    def ready(self, *roles: Role) -> tuple[Worker, ...]:
        """READY workers of these roles, ordered by id."""
        return tuple(
            worker
            for _, worker in sorted(self.workers.items())
            if worker.role in roles and worker.state is WorkerState.READY
        )
