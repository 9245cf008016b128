"""Workers and adapters as the processes of a cluster tell each other of them."""

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
    """STARTING: the engine loads. READY: takes requests. DRAINING: finishes requests. DEAD: silent or unreachable."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    DEAD = "dead"


class AdapterState(StrEnum):
    """An adapter's state on a worker: it loads, lies in host memory, or has an engine slot too."""

    LOADING = "loading"
    HOST = "host"
    SLOT = "slot"


@dataclass(frozen=True, slots=True)
class TierTotals:
    """Contents of a worker's adapter tiers, and totals since its start.

    `hits` counts requests by the tier in which they found their adapter. `loads` and `load_seconds` measure loads into
    host memory, from disk or from the source. `host_bytes` includes loads under way. `disk_bytes` is the whole
    machine's figure at this worker's last write to disk.
    """

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


@dataclass(frozen=True, slots=True)
class Worker:
    """One worker's registration: all that stays the same while the worker lives.

    `address` is `host:port` of its gRPC services, empty while the engine loads. `fingerprint` names model, dtype, KV
    layout, block size and attention backend: KV moves only between equal fingerprints. A colocated worker's fingerprint
    is unique: its KV moves nowhere. `kv_blocks` excludes the engine's reserved null block.
    """

    id: str
    role: Role
    address: str = ""
    fingerprint: str = ""
    pid: int = 0
    engine_pids: tuple[int, ...] = ()
    block_size: int = 16
    block_bytes: int = 0  # one KV block over all layers; 0 if its KV moves nowhere
    kv_blocks: int = 0
    staging_bytes: int = 0
    max_num_seqs: int = 0
    adapter_slots: int = 0  # distinct adapters in one engine batch; 0 if the worker runs no adapters

    def blocks(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    def kv_bytes(self, tokens: int) -> int:
        """Bytes of staging memory for the KV of a prompt of `tokens` tokens."""
        return self.blocks(tokens) * self.block_bytes + REGION_BYTES if self.block_bytes else 0


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """A worker's use at one moment, as the worker itself tells it to one router.

    `running` counts all requests. The `other_` counts leave out the asking router's own requests: prompts that aren't
    computed yet and their tokens, and choices that are being decoded. `staging_bytes_used` leaves out copies that new
    KV may replace; `staging_bytes_fit` is the largest region that could be reserved now. `preemptions` is a total.
    `stalled_seconds` counts the time for which the engine hasn't answered, once it is longer than any usual step; 0: it
    answers. `other_slot_wait_ms` counts the milliseconds for which another router's request has waited for a slot; 0:
    none waits.
    """

    draining: bool = False
    running: int = 0
    kv_blocks_used: int = 0
    staging_bytes_used: int = 0
    staging_bytes_fit: int = 0
    open_handles: int = 0
    preemptions: int = 0
    stalled_seconds: int = 0
    other_prompts: int = 0
    other_prompt_tokens: int = 0
    other_sequences: int = 0
    other_slot_wait_ms: int = 0
    tiers: TierTotals = field(default_factory=TierTotals)


@dataclass(frozen=True, slots=True)
class AdapterStatus:
    """One adapter on one worker; `state` None: gone. `other_prompts`: other routers' prompts that need its slot."""

    state: AdapterState | None
    other_prompts: int = 0


@dataclass(frozen=True, slots=True)
class StatusUpdate:
    """One message of a worker's status stream. `adapters` holds what changed, by digest; all of it if `is_whole`."""

    status: WorkerStatus
    adapters: Mapping[str, AdapterStatus] = field(default_factory=dict)
    is_whole: bool = False


@dataclass(frozen=True, slots=True)
class WorkerSeen:
    """A worker as a router sees it now. `seconds`: since its last message, or since its registration was first read."""

    worker: Worker
    state: WorkerState
    status: WorkerStatus
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """The worker as `/v1/workers` and `preft status --json` show it."""
        return {
            **asdict(self.worker),
            "state": self.state.value,
            "seconds_since_heard": round(self.seconds, 1),
            "status": asdict(self.status),
        }


@dataclass(frozen=True, slots=True)
class RouterStats:
    """`in_flight` counts prefills or sequences per worker id. Times are in seconds.

    `waiting`, `in_flight` and `longest_wait` are figures of this moment, all others are totals. `waited` adds up the
    waits of the `leases`: the placed attempts of all requests.
    """

    waiting: int = 0
    in_flight: Mapping[str, int] = field(default_factory=dict)
    retries: int = 0  # attempts repeated before the first token
    resumes: int = 0  # attempts that continue choices that have tokens
    refused: int = 0  # requests for which the queue had no room
    longest_wait: float = 0.0
    leases: int = 0
    waited: float = 0.0


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
    """One worker's copy of an adapter, as the worker told it last. `prompts`: prompts under it that aren't computed."""

    worker_id: str
    state: AdapterState
    prompts: int = 0
