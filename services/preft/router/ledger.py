"""This router's own count of its reservations on each worker, so that placement needn't wait for heartbeats.

The ledger only counts. The policy decides who gets room, and the lease when room is released.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from typing import TypeVar

from preft.core.cluster import Role, Worker

K = TypeVar("K", bound=Hashable)

HEARTBEATS = 3  # for so many beats, our own record of an adapter load outranks the worker's heartbeat


class _Memory:
    """One kind of memory on all workers, in its own unit: used by this router (own), and elsewhere (foreign).

    Heartbeats report the total use, and are late: the reported use may include reservations of ours that have ended
    since. So only use beyond our own peak since the previous heartbeat counts as foreign.
    """

    def __init__(self) -> None:
        self.own: Counter[str] = Counter()
        self._peak: dict[str, int] = {}  # most own since the last heartbeat
        self._foreign: dict[str, int] = {}

    def taken(self, worker_id: str) -> int:
        return self.own.get(worker_id, 0) + self._foreign.get(worker_id, 0)

    def add(self, worker_id: str, amount: int) -> None:
        if amount:
            self.own[worker_id] += amount
            self._peak[worker_id] = max(self._peak.get(worker_id, 0), self.own[worker_id])

    def drop(self, worker_id: str, amount: int) -> None:
        if amount:
            _take(self.own, worker_id, amount)

    def heard(self, worker_id: str, used: int) -> None:
        """Takes a new heartbeat's total use."""
        self._foreign[worker_id] = max(0, used - self._peak.get(worker_id, 0))
        self._peak[worker_id] = self.own.get(worker_id, 0)

    def forget(self, worker_id: str) -> None:
        self._foreign.pop(worker_id, None)
        self._peak.pop(worker_id, None)


class Ledger:
    """Counts per worker id: running prefills (also per adapter digest), staging bytes, KV blocks, sequences."""

    def __init__(self) -> None:
        self._prefills: Counter[str] = Counter()
        self._adapters: Counter[tuple[str, str]] = Counter()
        self._distinct: Counter[str] = Counter()
        self._loading: set[tuple[str, str]] = set()
        self._loaded: dict[tuple[str, str], int] = {}  # heartbeats for which this record still counts
        self._refused: dict[tuple[str, str], int] = {}  # likewise
        self._slots_kept: set[str] = set()
        self._blocks = _Memory()
        self._staging = _Memory()
        self._sequences: Counter[str] = Counter()
        self._heartbeats: dict[str, float] = {}
        self._beats: dict[str, float] = {}  # heartbeats of workers that hold adapters

    @property
    def idle(self) -> bool:
        held = (self._prefills, self._adapters, self._blocks.own, self._staging.own, self._sequences)
        return not any(held)

    def prefills(self, worker_id: str) -> int:
        """This router's running prefills on the worker."""
        return self._prefills.get(worker_id, 0)

    def prompts_of(self, worker_id: str, digest: str) -> int:
        """This router's prefills on the worker that use this adapter and whose prompt isn't computed yet."""
        return self._adapters.get((worker_id, digest), 0)

    def distinct_adapters(self, worker_id: str) -> int:
        """Adapters that uncomputed prompts on the worker use, which is the number of engine slots taken."""
        return self._distinct.get(worker_id, 0)

    def loading(self, worker_id: str, digest: str) -> bool:
        """Whether the worker was asked for this adapter and hasn't answered yet."""
        return (worker_id, digest) in self._loading

    def loaded(self, worker_id: str, digest: str) -> bool:
        """Whether the worker surely has the adapter: its prompts use it, or the worker has just loaded it."""
        return (worker_id, digest) in self._loaded or self.prompts_of(worker_id, digest) > 0

    def load_begins(self, worker_id: str, digest: str) -> None:
        """Records that the worker is asked to load an adapter."""
        self._loading.add((worker_id, digest))

    def load_ended(self, worker_id: str, digest: str, *, done: bool) -> None:
        """Records the worker's answer: loaded (`done`) or refused. After HEARTBEATS beats the record expires."""
        self._loading.discard((worker_id, digest))
        self._refused.pop((worker_id, digest), None)
        (self._loaded if done else self._refused)[worker_id, digest] = HEARTBEATS

    def refused(self, worker_id: str, digest: str) -> bool:
        """Whether the worker recently failed to load this adapter."""
        return (worker_id, digest) in self._refused

    def keep_slots(self, worker_id: str) -> None:
        """Reserves the worker's next free adapter slot for a request that has waited long, until `keep_no_slots`."""
        self._slots_kept.add(worker_id)

    def keep_no_slots(self) -> None:
        """Ends all reservations of slots."""
        self._slots_kept.clear()

    def slots_kept(self, worker_id: str) -> bool:
        """Whether the worker's slots are reserved: a new request may neither take nor share one."""
        return worker_id in self._slots_kept

    def blocks(self, worker_id: str) -> int:
        """KV blocks taken on the worker: reserved by this router, or in use elsewhere as of the last heartbeat."""
        return self._blocks.taken(worker_id)

    def staging(self, worker_id: str) -> int:
        """Bytes of the worker's staging memory that are taken, as in `blocks`; evictable copies don't count."""
        return self._staging.taken(worker_id)

    def sequences(self, worker_id: str) -> int:
        """This router's choices that the worker decodes, or is about to."""
        return self._sequences.get(worker_id, 0)

    def in_flight(self) -> Mapping[str, int]:
        """Prefills and sequences per worker, without idle workers."""
        return {**self._prefills, **self._sequences}

    def add_prefill(self, worker_id: str, digest: str) -> None:
        self._prefills[worker_id] += 1
        self._adapters[worker_id, digest] += 1
        if digest and self._adapters[worker_id, digest] == 1:
            self._distinct[worker_id] += 1

    def drop_prompt(self, worker_id: str, digest: str) -> None:
        """The prompt of one prefill is computed, and no longer needs its adapter."""
        _take(self._adapters, (worker_id, digest), 1)
        if digest and not self._adapters[worker_id, digest]:
            _take(self._distinct, worker_id, 1)

    def drop_prefill(self, worker_id: str) -> None:
        """One prefill has ended, after its prompt."""
        _take(self._prefills, worker_id, 1)

    def add_decode(self, worker_id: str, blocks: int, sequences: int) -> None:
        """Reserves KV blocks for `sequences` more choices; 0 means that a running choice has grown."""
        self._blocks.add(worker_id, blocks)
        if sequences:
            self._sequences[worker_id] += sequences

    def drop_decode(self, worker_id: str, blocks: int, sequences: int) -> None:
        """Releases the blocks of ended choices."""
        self._blocks.drop(worker_id, blocks)
        _take(self._sequences, worker_id, sequences)

    def add_staging(self, worker_id: str, size: int) -> None:
        self._staging.add(worker_id, size)

    def drop_staging(self, worker_id: str, size: int) -> None:
        self._staging.drop(worker_id, size)

    def observe(self, workers: Iterable[Worker]) -> None:
        """Computes from new heartbeats how much of each worker's memory is foreign."""
        workers = tuple(workers)
        self._forget_loads(workers)
        known = {worker.id: worker for worker in workers}
        for gone in self._heartbeats.keys() - known.keys():
            del self._heartbeats[gone]
            self._blocks.forget(gone)
            self._staging.forget(gone)
        for worker in known.values():
            if self._heartbeats.get(worker.id) != worker.heartbeat:
                self._heartbeats[worker.id] = worker.heartbeat
                load = worker.load
                if worker.role is not Role.PREFILL:  # KV blocks of prefill workers are not reserved
                    self._blocks.heard(worker.id, load.kv_blocks_total - load.kv_blocks_free)
                self._staging.heard(worker.id, load.staging_bytes_used - load.staging_bytes_evictable)

    def _forget_loads(self, workers: Iterable[Worker]) -> None:
        beats = {worker.id: worker.heartbeat for worker in workers if worker.role is not Role.DECODE}
        heard = {worker_id for worker_id, beat in beats.items() if self._beats.get(worker_id) != beat}
        self._beats = beats
        self._loaded, self._refused = (
            {
                (worker_id, digest): count - (worker_id in heard)
                for (worker_id, digest), count in words.items()
                if worker_id in beats and count > (worker_id in heard)
            }
            for words in (self._loaded, self._refused)
        )


def _take(counter: Counter[K], key: K, amount: int) -> None:
    counter[key] -= amount
    if counter[key] < 0:
        raise ValueError(f"{key} gives back more than it took")
    if counter[key] == 0:
        del counter[key]
