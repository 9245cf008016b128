"""Chooses the workers of a request: a pure function of the request, the cluster and the requests in flight.

The policy owns the choice alone, and keeps no state. `admission` owns waiting for room.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto
from typing import Protocol
from zlib import crc32

from preft.core.cluster import ClusterSnapshot, Role, Worker
from preft.core.request import AdapterRef
from preft.router.ledger import Ledger


@dataclass(frozen=True, slots=True)
class Demand:
    """A request's needs from the cluster. Tokens are per choice and include the prompt.

    Decode should have room for `kv_tokens` at the start; the sequence may grow to `max_tokens`. The KV of
    `prompt_tokens` goes through staging memory on both workers. `decodes` is False if the first token is also the
    last: then the request needs no decode worker and no staging memory.
    """

    digest: str  # of the adapter; "" is the base model
    kv_tokens: int
    max_tokens: int
    prompt_tokens: int = 0
    choices: int = 1
    decodes: bool = True
    adapter: AdapterRef | None = None  # names the adapter to a worker that has to load it

    def blocks(self, worker: Worker) -> int:
        """KV blocks to reserve on `worker` for each choice."""
        return worker.blocks(self.kv_tokens)

    def staging(self, worker: Worker) -> int:
        """Bytes of staging memory to reserve on `worker`, once for all choices."""
        return worker.staging_bytes(self.prompt_tokens) if self.decodes else 0

    def covers(self, other: Demand) -> bool:
        """Whether this demand needs at least as much room for its KV as `other`."""
        return (
            self.decodes
            and self.kv_tokens >= other.kv_tokens
            and self.choices >= other.choices
            and self.prompt_tokens >= other.prompt_tokens
        )


@dataclass(frozen=True, slots=True)
class Pair:
    """The workers of one attempt."""

    prefill: Worker
    decode: Worker | None


@dataclass(frozen=True, slots=True)
class Absent:
    """The worker must load the adapter first; until then the request reserves nothing."""

    worker: Worker


@dataclass(frozen=True, slots=True)
class Crowded:
    """The worker has the adapter, but its slots, prefills or staging memory are taken: the request waits for it."""

    worker: Worker


class Refusal(Enum):
    """Why no worker fits now, for any adapter."""

    NO_PREFILL = auto()  # no prefill worker takes another prefill
    NO_STAGING = auto()  # no prefill worker has enough free staging memory
    NO_DECODE = auto()  # no decode worker has enough room


@dataclass(frozen=True, slots=True)
class Roster:
    """A snapshot's ready workers: decode workers by fingerprint, and the ids of the holders of each adapter.

    A colocated worker is on both lists, and is paired with itself: its fingerprint is its own.
    """

    prefill: tuple[Worker, ...]
    decode: Mapping[str, tuple[Worker, ...]]
    holders: Mapping[str, frozenset[str]]

    @classmethod
    def of(cls, snapshot: ClusterSnapshot) -> Roster:
        prefill = snapshot.ready(Role.PREFILL, Role.COLOCATED)
        decode: dict[str, list[Worker]] = {}
        for worker in snapshot.ready(Role.DECODE, Role.COLOCATED):
            decode.setdefault(worker.fingerprint, []).append(worker)
        holders: dict[str, set[str]] = {}
        for worker in prefill:
            for digest in worker.load.adapters:
                holders.setdefault(digest, set()).add(worker.id)
        return cls(
            prefill,
            {fingerprint: tuple(workers) for fingerprint, workers in decode.items()},
            {digest: frozenset(ids) for digest, ids in holders.items()},
        )

    @property
    def serving(self) -> bool:
        """Whether a prefill worker and a decode worker with equal fingerprints are ready."""
        return any(worker.fingerprint in self.decode for worker in self.prefill)

    def without_decode(self, worker: Worker) -> Roster:
        others = tuple(other for other in self.decode[worker.fingerprint] if other.id != worker.id)
        decode = {**self.decode, worker.fingerprint: others}
        return replace(self, decode={name: workers for name, workers in decode.items() if workers})

    def without_prefill(self, worker: Worker) -> Roster:
        return replace(self, prefill=tuple(other for other in self.prefill if other.id != worker.id))


class Policy(Protocol):
    """Chooses workers. Implementations are pure: equal arguments give an equal choice, and nothing changes."""

    def place(
        self, demand: Demand, roster: Roster, ledger: Ledger, avoid: frozenset[str]
    ) -> Pair | Absent | Crowded | Refusal:
        """Returns two workers of equal fingerprint with room for `demand`, or why there are none.

        Workers in `avoid` (ids) have just failed this request, and are used only if no other is ready. With an empty
        `avoid`, a Refusal also holds for every demand that `covers` this one.
        """

    def home(self, demand: Demand, roster: Roster, ledger: Ledger) -> Worker | None:
        """The worker that should load `demand`'s adapter meanwhile; None if a worker holds or loads it already."""


@dataclass(frozen=True, slots=True)
class AffinityPolicy:
    """Prefill goes to a holder of the adapter, unless the holder is clearly busier than another worker.

    Decode goes to the worker with most room. An adapter that no worker holds gets a home by hash: so adapters spread
    over the workers, and all routers of a cluster agree on the home before a heartbeat reports the adapter.
    """

    max_inflight_prefills: int  # per worker
    busier_factor: float = 2.0  # the adapter's holder may have this many times the least load ...
    busier_slack: int = 4  # ... plus this many prefills
    queued_share: float = 0.25  # sequences sent to a decode worker beyond its batch, which keep the batch full

    def place(
        self, demand: Demand, roster: Roster, ledger: Ledger, avoid: frozenset[str]
    ) -> Pair | Absent | Crowded | Refusal:
        """See `Policy.place`."""
        decode: dict[str, Worker] = {}
        if demand.decodes:
            for fingerprint, workers in roster.decode.items():
                worker = self._roomiest(demand, _prefer(workers, avoid), ledger)
                if worker is not None:
                    decode[fingerprint] = worker
        ready = _prefer(roster.prefill, avoid)
        takers = [worker for worker in ready if self._takes_more(worker, ledger)]
        if not takers:
            return Refusal.NO_PREFILL
        if demand.decodes:
            ready = tuple(worker for worker in ready if worker.fingerprint in decode)
            takers = [worker for worker in takers if worker.fingerprint in decode]
            if not takers:
                return Refusal.NO_DECODE
            staging = [worker for worker in takers if _stages(worker, demand, ledger)]
            if not staging:
                return Refusal.NO_STAGING
            if len(staging) < len(takers):  # never wait for a worker whose staging memory is too small
                ready = tuple(worker for worker in ready if demand.staging(worker) <= worker.load.staging_bytes_total)
            takers = staging
        prefill = self._nearest(demand, ready, takers, roster, ledger)
        if demand.adapter is not None and not _holds(prefill, demand.digest, roster, ledger):
            return Absent(prefill)
        has_room = self._takes_more(prefill, ledger) and _stages(prefill, demand, ledger)
        if demand.digest and not (has_room and _has_slot(prefill, demand.digest, ledger)):
            return Crowded(prefill)
        return Pair(prefill, decode.get(prefill.fingerprint))

    def home(self, demand: Demand, roster: Roster, ledger: Ledger) -> Worker | None:
        """See `Policy.home`."""
        workers = [worker for worker in roster.prefill if not demand.decodes or worker.fingerprint in roster.decode]
        if not workers or any(_near(worker, demand.digest, roster, ledger) for worker in workers):
            return None
        return _home(demand.digest, workers)

    def _takes_more(self, worker: Worker, ledger: Ledger) -> bool:
        return ledger.prefills(worker.id) < self.max_inflight_prefills

    def _roomiest(self, demand: Demand, workers: tuple[Worker, ...], ledger: Ledger) -> Worker | None:
        """The decode worker that would be least full, by memory or by batch, whichever is fuller on that worker."""
        best, best_key = None, (2.0, 0, "")
        for worker in workers:
            total = worker.load.kv_blocks_total
            blocks = ledger.blocks(worker.id) + demand.blocks(worker) * demand.choices
            running = ledger.sequences(worker.id)
            batch = worker.max_num_seqs * (1 + self.queued_share) if worker.max_num_seqs else float("inf")
            crowd = min(demand.choices, max(1, batch - worker.max_num_seqs))  # further choices wait in the engine
            if blocks > total or (running and running + crowd > batch) or not _stages(worker, demand, ledger):
                continue
            key = (max(blocks / total, running / batch), worker.load.running, worker.id)
            if key < best_key:
                best, best_key = worker, key
        return best

    def _nearest(
        self, demand: Demand, workers: Sequence[Worker], takers: Sequence[Worker], roster: Roster, ledger: Ledger
    ) -> Worker:
        """The worker that should compute the prompt, now or once it has room, a slot or the adapter.

        `takers` are the workers that have room now, at least one.
        """
        digest = demand.digest

        def load(worker: Worker) -> tuple[int, int, str]:
            return ledger.prefills(worker.id), worker.load.running, worker.id

        def bearable(worker: Worker) -> bool:
            if not _stages(worker, demand, ledger):
                return False
            limit = ledger.prefills(least.id) * self.busier_factor
            return ledger.prefills(worker.id) <= limit + (self.busier_slack if self._takes_more(worker, ledger) else 0)

        least = min(takers, key=load)
        if not digest:
            return least
        holders = [worker for worker in workers if _holds(worker, digest, roster, ledger)]
        loading = [worker for worker in workers if worker not in holders and ledger.loading(worker.id, digest)]
        if not holders and not loading:
            home = _home(digest, workers)
            return home if bearable(home) else least
        for near in (holders, loading):  # a request never waits for a load where a holder can serve it
            near = [w for w in near if _has_slot(w, digest, ledger) and _stages(w, demand, ledger)]
            if near and bearable(nearest := min(near, key=load)):
                return nearest
        near = holders or loading
        nearest = min([worker for worker in near if _has_slot(worker, digest, ledger)] or near, key=load)
        others = [worker for worker in workers if worker not in near and not ledger.refused(worker.id, digest)]
        others = [worker for worker in others if _has_slot(worker, digest, ledger) and bearable(worker)]
        return nearest if bearable(nearest) or not others else min(others, key=load)


def _holds(worker: Worker, digest: str, roster: Roster, ledger: Ledger) -> bool:
    return worker.id in roster.holders.get(digest, ()) or ledger.loaded(worker.id, digest)


def _near(worker: Worker, digest: str, roster: Roster, ledger: Ledger) -> bool:
    """Whether the worker has the adapter or is loading it."""
    return _holds(worker, digest, roster, ledger) or ledger.loading(worker.id, digest)


def _has_slot(worker: Worker, digest: str, ledger: Ledger) -> bool:
    """Whether the worker's engine can add one more prompt with this adapter to its batch."""
    if ledger.slots_kept(worker.id):
        return False
    if not worker.adapter_slots or ledger.prompts_of(worker.id, digest):
        return True
    return ledger.distinct_adapters(worker.id) < worker.adapter_slots


def _stages(worker: Worker, demand: Demand, ledger: Ledger) -> bool:
    """Whether the worker's staging memory has room for the prompt's KV."""
    needed = demand.staging(worker)
    return not needed or ledger.staging(worker.id) + needed <= worker.load.staging_bytes_total


def _home(digest: str, workers: Sequence[Worker]) -> Worker:
    """Rendezvous hashing: if a worker comes or goes, only its own adapters move."""
    seed = crc32(digest.encode())
    return max(workers, key=lambda worker: ((crc32(worker.id.encode()) ^ seed) * 2654435761) & 0xFFFFFFFF)


def _prefer(workers: tuple[Worker, ...], avoid: frozenset[str]) -> tuple[Worker, ...]:
    """The workers not in `avoid`, or all workers if none is left."""
    return (tuple(worker for worker in workers if worker.id not in avoid) or workers) if avoid else workers
