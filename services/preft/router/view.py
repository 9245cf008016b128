"""The router's one picture of the cluster: all workers, with indexes by load and by adapter.

The view only records: `policy` chooses workers, `admission` owns waiting, and `watches` reads the status streams.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

from preft.core.cluster import Role, Worker, WorkerState
from preft.router.load_index import HashRing, LoadIndex
from preft.router.prefixes import PrefixIndex
from preft.router.worker_view import WorkerView

FULLNESS_LEVELS = 64  # of decode workers


class ClusterView:
    """All workers. `prefill` has ready workers that compute prompts and may begin another, `decode` those that decode.

    A colocated worker is in both, and is paired with itself: its fingerprint is its own.
    """

    def __init__(self, max_prefills: int, queued_share: float) -> None:
        """A prefill worker computes at most `max_prefills` prompts of this router at once.

        A decode worker gets `queued_share` more sequences than its batch holds: they keep the batch full.
        """
        self.max_prefills = max_prefills
        self._queued_share = queued_share
        self.workers: dict[str, WorkerView] = {}
        self.prefill: LoadIndex[WorkerView] = LoadIndex()
        self.decode: dict[str, LoadIndex[WorkerView]] = {}
        self.ring = HashRing()  # of ready workers that compute prompts, whatever their load
        self.prefixes = PrefixIndex()
        self.holders: dict[str, dict[str, WorkerView]] = {}
        self.loaders: dict[str, dict[str, WorkerView]] = {}
        self.stalled: set[str] = set()  # ids of ready workers whose engines make no step
        self._prompting: Counter[str] = Counter()  # ready workers that compute prompts, by fingerprint
        self._shapes: tuple[list[Worker], list[Worker]] | None = None
        self._members: dict[str, str] = {}  # of the ring: id -> fingerprint

    def register(self, workers: Iterable[Worker], now: float = 0.0) -> None:
        """Takes the registry's whole list. A worker whose process or engine is a new one starts anew."""
        known = {worker.id: worker for worker in workers}
        for view in list(self.workers.values()):
            if known.get(view.id) != view.worker:
                self._remove(view)
        for worker in known.values():
            if worker.id not in self.workers:
                self.workers[worker.id] = WorkerView(worker, self, now)

    @property
    def serving(self) -> bool:
        """Whether a prefill worker and a decode worker with equal fingerprints are ready."""
        return any(fingerprint in self.decode for fingerprint in self._prompting)

    @property
    def several(self) -> bool:
        """Whether several ready workers compute prompts."""
        return len(self._members) > 1

    def ready(self, *roles: Role) -> list[WorkerView]:
        """READY workers of these roles, ordered by id."""
        views = (self.workers[key] for key in sorted(self.workers))
        return [view for view in views if view.worker.role in roles and view.state is WorkerState.READY]

    def prompting(self) -> Iterator[WorkerView]:
        """Ready workers that compute prompts, whatever their load."""
        return (self.workers[key] for key in self._members)

    def decoding(self) -> Iterator[WorkerView]:
        """Ready workers that decode and have a prefill worker, least loaded first."""
        return (view for key, index in self.decode.items() if key in self._prompting for view in index)

    def shapes(self) -> tuple[list[Worker], list[Worker]]:
        """One of each size of ready workers that compute prompts, and of those that decode for them."""
        if self._shapes is None:
            prompting = {_shape(view.worker): view.worker for view in self.prompting()}
            decoding = {_shape(view.worker): view.worker for view in self.decoding()}
            self._shapes = list(prompting.values()), list(decoding.values())
        return self._shapes

    def batch(self, worker: Worker) -> float:
        """The most sequences that a decode worker gets."""
        return worker.max_num_seqs * (1 + self._queued_share) if worker.max_num_seqs else float("inf")

    def in_flight(self) -> Mapping[str, int]:
        """Own prefills and sequences per worker, without idle workers."""
        return {key: count for key, view in self.workers.items() if (count := view.prefills + view.sequences)}

    # Called by the WorkerViews

    def enter(self, view: WorkerView) -> None:
        """Takes a worker into the indexes, or out of them, after its state has changed."""
        self._shapes = None
        fingerprint, role = view.worker.fingerprint, view.worker.role
        ready = view.state is WorkerState.READY and self.workers.get(view.id) is view
        if role is not Role.DECODE:
            if ready and view.id not in self._members:
                self._members[view.id] = fingerprint
                self.ring.add(view.id)
                self._prompting[fingerprint] += 1
            elif not ready and view.id in self._members:
                del self._members[view.id]
                self.ring.remove(view.id)
                self._prompting[fingerprint] -= 1
                if not self._prompting[fingerprint]:
                    del self._prompting[fingerprint]
        if role is not Role.PREFILL and not ready and fingerprint in self.decode:
            self.decode[fingerprint].remove(view.id)
            if not len(self.decode[fingerprint]):
                del self.decode[fingerprint]
        if ready and view.is_stalled:
            self.stalled.add(view.id)
        else:
            self.stalled.discard(view.id)
        if ready:
            self.move(view)
        else:
            self.prefill.remove(view.id)

    def move(self, view: WorkerView) -> None:
        """Puts a ready worker at its place in the order of load."""
        if view.state is not WorkerState.READY or self.workers.get(view.id) is not view:
            return
        if view.worker.role is not Role.DECODE:
            if view.prefills < self.max_prefills:
                self.prefill.put(view.id, view, view.load)
            else:
                self.prefill.remove(view.id)
        if view.worker.role is not Role.PREFILL:
            index = self.decode.setdefault(view.worker.fingerprint, LoadIndex())
            index.put(view.id, view, int(FULLNESS_LEVELS * self.fullness(view)))

    def fullness(self, view: WorkerView, blocks: int = 0) -> float:
        """How full a decode worker would be with `blocks` more: by memory or by batch, whichever is fuller."""
        worker, status = view.worker, view.status
        sequences = view.sequences + (status.other_sequences if status else 0)
        memory = (view.blocks.taken + blocks) / worker.kv_blocks if worker.kv_blocks else 0.0
        return max(memory, sequences / self.batch(worker))

    def place_adapter(self, view: WorkerView, digest: str) -> None:
        """Keeps the lists of an adapter's holders and loaders."""
        here = self.workers.get(view.id) is view and view.worker.role is not Role.DECODE
        for places, there in ((self.holders, view.holds(digest)), (self.loaders, view.is_loading(digest))):
            if here and there:
                places.setdefault(digest, {})[view.id] = view
            elif digest in places:
                places[digest].pop(view.id, None)
                if not places[digest]:
                    del places[digest]

    def _remove(self, view: WorkerView) -> None:
        del self.workers[view.id]
        view.status = None  # a request that waits for this worker must see that the worker is gone
        self.enter(view)
        for digest in {*view.adapters, *view.loads, *view.slots, *view._loaded}:
            self.place_adapter(view, digest)
        view.cluster = None


def _shape(worker: Worker) -> tuple[int, ...]:
    return worker.block_size, worker.block_bytes, worker.kv_blocks, worker.staging_bytes
