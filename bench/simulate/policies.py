"""Policies of other routers, to compare with the router's own under the same workers and the same queue.

Each sends a request to the worker of its choice at once, whether the worker holds the adapter or not: the worker loads
it, and the prompt waits there. Only a worker with too many prompts makes the request wait in the router. The policies
use the view's loads, which count every reservation at once; the originals read loads that are late.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from hashlib import blake2b
from itertools import count

from preft.router.policy import AffinityPolicy, Crowded, Demand, Pair, Placement, Policy, Refusal
from preft.router.view import ClusterView
from preft.router.worker_view import WorkerView


class Direct:
    """Base of the compared policies: subclasses choose the prefill worker, decode goes to the emptiest worker."""

    def place(self, demand: Demand, view: ClusterView, now: float) -> Placement:
        """See `Policy.place`."""
        decode = _emptiest(demand, view)
        if demand.decodes and decode is None:
            return Refusal.NO_DECODE
        worker = self.choose(demand, view, now)
        if worker is None:
            return Refusal.NO_PREFILL
        if not fits(worker, demand, view):
            return Crowded(worker)
        return Pair(worker, decode if demand.decodes else None)

    def home(self, demand: Demand, view: ClusterView, now: float) -> WorkerView | None:
        """None: adapters load after their requests have come to the worker."""
        return None

    def choose(self, demand: Demand, view: ClusterView, now: float) -> WorkerView | None:
        """The prefill worker, whether it has room now or not; None if none is ready."""
        raise NotImplementedError


class RoundRobin(Direct):
    """The workers in turn, without those that have no room."""

    def __init__(self) -> None:
        self._turn = count()

    def choose(self, demand: Demand, view: ClusterView, now: float) -> WorkerView | None:
        workers = _ready(demand, view)
        turn = next(self._turn)
        for step in range(len(workers)):
            worker = workers[(turn + step) % len(workers)]
            if fits(worker, demand, view):
                return worker
        return workers[turn % len(workers)] if workers else None


class LeastLoaded(Direct):
    """The worker with the fewest prompts."""

    def choose(self, demand: Demand, view: ClusterView, now: float) -> WorkerView | None:
        return next((one for one in view.prefill if one.id not in demand.avoid and fits(one, demand, view)), None)


class WhereLoaded(LeastLoaded):
    """The worker that used the adapter last, if it holds it; else the least loaded holder; else the least loaded."""

    def __init__(self) -> None:
        self._last: dict[str, str] = {}

    def choose(self, demand: Demand, view: ClusterView, now: float) -> WorkerView | None:
        if not demand.digest:
            return super().choose(demand, view, now)
        holders = {**view.loaders.get(demand.digest, {}), **view.holders.get(demand.digest, {})}
        usable = [one for one in holders.values() if one.is_ready and one.id not in demand.avoid]
        last = self._last.get(demand.digest)
        chosen = next((one for one in usable if one.id == last), None)
        chosen = chosen or min(usable, key=_load, default=None) or super().choose(demand, view, now)
        if chosen is not None:
            self._last[demand.digest] = chosen.id
        return chosen


class ConsistentHash(LeastLoaded):
    """The adapter's place on a hash ring, whatever its load (Karger et al., 1997)."""

    def choose(self, demand: Demand, view: ClusterView, now: float) -> WorkerView | None:
        if not demand.digest:
            return super().choose(demand, view, now)
        places = view.ring.places(demand.digest, 1 + len(demand.avoid))
        return next((view.workers[key] for key in places if key not in demand.avoid), None)


class Dynamo(LeastLoaded):
    """A model of NVIDIA Dynamo's LoRA routing: as many replicas as the adapter's load asks for, by rendezvous hashing.

    Source: ai-dynamo/dynamo, lib/llm/src/lora/{controller,filter,config}.rs. A controller counts the requests of each
    adapter in a sliding window. Every 3 s it gives each active adapter a share of all slots in proportion, and at least
    one worker: the first ones by hash of adapter and worker. A request goes to the replica with the least load, of
    those that hold the adapter if any does. An adapter without recent requests is pinned to its first worker. The
    model leaves out the slots that other adapters take, the slower scaling down, and KV prefixes.
    """

    TICK = 3.0
    KEPT = 30  # ticks in the window

    def __init__(self) -> None:
        self._ranked: dict[str, list[str]] = {}
        self._members = 0
        self._windows: list[Counter[str]] = [Counter()]
        self._counts: Counter[str] = Counter()
        self._ticked = 0.0
        self._last = -1  # serial of the youngest request that was counted

    def choose(self, demand: Demand, view: ClusterView, now: float) -> WorkerView | None:
        if not demand.digest:
            return super().choose(demand, view, now)
        self._count(demand, now)
        ids = self._rank(demand.digest, view)
        slots = sum(view.workers[key].worker.adapter_slots for key in ids[:1]) * len(ids)
        total = self._counts.total()
        number = max(1, round(slots * self._counts[demand.digest] / total)) if total else 1
        replicas = [view.workers[key] for key in ids if key not in demand.avoid][:number]
        loaded = [one for one in replicas if one.holds(demand.digest)]
        return min(loaded or replicas, key=_load, default=None)

    def _count(self, demand: Demand, now: float) -> None:
        if demand.order[1] > self._last:
            self._last = demand.order[1]
            self._windows[-1][demand.digest] += 1
        if now - self._ticked >= self.TICK:
            self._ticked = now
            self._counts = sum(self._windows, Counter())
            self._windows = [*self._windows[1 - self.KEPT :], Counter()]

    def _rank(self, digest: str, view: ClusterView) -> list[str]:
        """Ready workers by hash, highest first; computed once per adapter and set of workers."""
        members = hash(frozenset(one.id for one in view.prompting())) if digest not in self._ranked else self._members
        if members != self._members:
            self._members = members
            self._ranked.clear()
        ranked = self._ranked.get(digest)
        if ranked is None or any(not view.workers[key].is_ready for key in ranked[:8]):
            ready = [one.id for one in view.prompting()]
            ranked = sorted(ready, key=lambda key: _score(digest, key), reverse=True)[: 8 * len(ready)]
            self._ranked[digest] = ranked
        return [key for key in ranked if view.workers[key].is_ready]


class LlmD(Direct):
    """A model of llm-d's scheduler: the worker with the highest weighted sum of a residency and a load score.

    Source: kubernetes-sigs/gateway-api-inference-extension, pkg/epp/scheduling/framework/plugins/scorer:
    lora_affinity.go (1 where the adapter is active, 0.8 where a slot is free, 0.6 where it waits to be loaded, else 0)
    and queue.go (1 for the shortest queue, 0 for the longest). The weight 4 is that of KServe's preset for LoRA, 2 that
    of queues in Red Hat's documentation of llm-d. Where the original knows only the adapters of running requests, the
    model counts all that the worker has in memory.
    """

    RESIDENCY, QUEUE = 4.0, 2.0

    def choose(self, demand: Demand, view: ClusterView, now: float) -> WorkerView | None:
        workers = _ready(demand, view)
        if not workers:
            return None
        loads = [one.load for one in workers]
        least, most = min(loads), max(loads)
        span = max(1, most - least)
        best, chosen = -1.0, None
        for worker, load in zip(workers, loads, strict=True):
            score = self.QUEUE * ((most - load) / span if most > least else 1.0)
            if demand.digest:
                score += self.RESIDENCY * _residency(worker, demand.digest)
            if score > best:
                best, chosen = score, worker
        return chosen


def _residency(worker: WorkerView, digest: str) -> float:
    if worker.holds(digest):
        return 1.0
    if worker.slots_used < worker.worker.adapter_slots:
        return 0.8
    return 0.6 if worker.is_loading(digest) else 0.0


def fits(worker: WorkerView, demand: Demand, view: ClusterView) -> bool:
    """Whether the worker takes another prompt of this size."""
    return worker.prefills < view.max_prefills and worker.has_staging(demand.staging(worker.worker))


def _ready(demand: Demand, view: ClusterView) -> list[WorkerView]:
    workers: Iterable[WorkerView] = view.prompting()
    return [one for one in workers if one.id not in demand.avoid] or list(view.prompting())


def _emptiest(demand: Demand, view: ClusterView) -> WorkerView | None:
    for one in view.decoding():
        worker, batch = one.worker, view.batch(one.worker)
        room = one.blocks.taken + demand.blocks(worker) * demand.choices <= worker.kv_blocks
        batched = not one.sequences or one.sequences + demand.choices <= batch
        if room and batched and one.has_staging(demand.staging(worker)) and one.id not in demand.avoid:
            return one
    return None


def _load(worker: WorkerView) -> tuple[int, str]:
    return worker.load, worker.id


def _score(digest: str, worker_id: str) -> bytes:
    return blake2b(f"{digest} {worker_id}".encode(), digest_size=8).digest()


POLICIES: dict[str, Callable[[float], Policy]] = {
    "ours": lambda patience: AffinityPolicy(patience=patience),
    "least-loaded": lambda _: LeastLoaded(),
    "round-robin": lambda _: RoundRobin(),
    "where-loaded": lambda _: WhereLoaded(),
    "consistent-hash": lambda _: ConsistentHash(),
    "dynamo": lambda _: Dynamo(),
    "llm-d": lambda _: LlmD(),
}
"""Makes a policy, given the router's patience in seconds."""
