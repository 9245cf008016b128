"""Chooses the workers of a request: a pure function of the request, the view of the cluster, and the time.

The policy owns the choice alone, keeps no state and changes nothing. `admission` owns waiting for room.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass
from enum import Enum, auto
from typing import Protocol

from preft.core.cluster import Role, Worker
from preft.core.request import AdapterRef
from preft.router.view import ClusterView
from preft.router.worker_view import Order, WorkerView, work_of

RING_STEPS = 8  # places on the ring that one choice looks at
CHEAPEST = 6  # part of `load_price` that a load costs in any case
SHARED = 8  # prompts of one adapter at a worker that halve the price of another copy
OTHERS = 2  # times the patience: by how much another router's request may be overtaken
LOOKS = 16  # holders of a hot adapter that one choice looks at
FIRST: Order = (float("-inf"), 0, float("inf"))


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
    order: Order = FIRST
    beginnings: tuple[bytes, ...] = ()  # see `prefixes`
    avoid: frozenset[str] = frozenset()  # ids of workers that have just failed this request

    def blocks(self, worker: Worker) -> int:
        """KV blocks to reserve on `worker` for each choice."""
        return worker.blocks(self.kv_tokens)

    def staging(self, worker: Worker) -> int:
        """Bytes of staging memory to reserve on `worker`, once for all choices."""
        return worker.kv_bytes(self.prompt_tokens) if self.decodes else 0

    @property
    def work(self) -> int:
        """The prompt's share of a prefill worker's load."""
        return work_of(1, self.prompt_tokens)

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

    prefill: WorkerView
    decode: WorkerView | None


@dataclass(frozen=True, slots=True)
class Absent:
    """The worker must load the adapter first; until then the request reserves nothing."""

    worker: WorkerView


@dataclass(frozen=True, slots=True)
class Crowded:
    """The worker has the adapter, but its slots, prefills or staging memory are taken: the request waits for it."""

    worker: WorkerView


class Refusal(Enum):
    """Why no worker fits now, for any adapter."""

    NO_PREFILL = auto()  # no prefill worker takes another prefill
    NO_STAGING = auto()  # no prefill worker has enough free staging memory
    NO_DECODE = auto()  # no decode worker has enough room


Placement = Pair | Absent | Crowded | Refusal


class Policy(Protocol):
    """Chooses workers. Implementations are pure: equal arguments give an equal choice, and nothing changes."""

    def place(self, demand: Demand, view: ClusterView, now: float) -> Placement:
        """Returns two workers of equal fingerprint with room for `demand`, or why there are none.

        Stalled workers, and those in `demand.avoid`, are used only if no other is ready. With an empty `avoid`, a
        Refusal also holds for every younger demand that `covers` this one. `now` is in loop time.
        """

    def home(self, demand: Demand, view: ClusterView, now: float) -> WorkerView | None:
        """The worker that should load `demand`'s adapter although no worker has room for the request now.

        None if a worker holds or loads it already.
        """


@dataclass(frozen=True, slots=True)
class AffinityPolicy:
    """Prefill goes to a holder of the adapter, unless waiting there costs more than a load elsewhere.

    Decode goes to the emptiest worker, whatever the adapter. An adapter that no worker holds, or only workers that are
    too busy, goes to the least loaded of its first places on a hash ring. So adapters spread over the workers, a hot
    adapter spreads over several, and all routers of a cluster agree on the places, as in consistent hashing with
    bounded loads (Mirrokni et al., 2018). The loss of one worker moves its own adapters alone.

    The price of a load is work: a holder is left if it is busier than another worker by more than the price. A long
    prompt lowers the price, because it delays all that come behind it. Other prompts of the adapter lower the price,
    because they use the copy too.
    """

    load_price: int = 37  # work; the time of a load, the adapter that the load drives out, and a slot's change
    patience: float = 0.5  # seconds; a request that has waited longer has its slot or memory kept from younger ones

    def place(self, demand: Demand, view: ClusterView, now: float) -> Placement:
        """See `Policy.place`."""
        return _Choice(self, demand, view, now).place()

    def home(self, demand: Demand, view: ClusterView, now: float) -> WorkerView | None:
        """See `Policy.home`."""
        if demand.digest in view.holders or demand.digest in view.loaders:
            return None
        for key in view.ring.places(demand.digest, RING_STEPS):
            worker = view.workers[key]
            matched = not demand.decodes or worker.worker.fingerprint in view.decode
            is_avoided = worker.is_stalled or worker.id in demand.avoid
            if matched and not is_avoided and not worker.refused(demand.digest, now):
                return worker
        return None


class _Choice:
    """One call of `place`."""

    __slots__ = ("_avoided", "_decode", "_demand", "_limit", "_now", "_policy", "_staging", "_view")

    def __init__(self, policy: AffinityPolicy, demand: Demand, view: ClusterView, now: float) -> None:
        self._policy = policy
        self._demand = demand
        self._view = view
        self._now = now
        self._decode: dict[str, WorkerView | None] = {}  # by fingerprint, as is
        self._staging: dict[str, int] = {}
        self._avoided = _avoided(demand, view, view.prompting)

    def place(self) -> Placement:
        least = self._least()
        if isinstance(least, Refusal):
            return least
        self._limit = least.load + self._policy.load_price
        prefill = self._nearest(least) if self._demand.digest else self._known_prefix(self._view.workers) or least
        if self._demand.adapter is not None and not prefill.holds(self._demand.digest):
            return Absent(prefill)
        if self._demand.digest and not self._goes(prefill):
            return Crowded(prefill)
        return Pair(prefill, self._decode_of(prefill) if self._demand.decodes else None)

    def _least(self) -> WorkerView | Refusal:
        """The least loaded worker that takes the prompt now, for any adapter."""
        refusal = Refusal.NO_PREFILL
        for worker in self._view.prefill:
            if not self._open(worker):
                continue
            if self._demand.decodes and self._decode_of(worker) is None:
                refusal = Refusal.NO_DECODE
            elif not self._stages(worker):
                refusal = Refusal.NO_STAGING
            else:
                return worker
        return refusal

    def _nearest(self, least: WorkerView) -> WorkerView:
        """The worker that should compute the prompt, now or once it has room, a slot or the adapter."""
        digest = self._demand.digest
        holders, loaders = self._view.holders.get(digest, {}), self._view.loaders.get(digest, {})
        if known := self._known_prefix(holders):
            return known
        holder, loader = self._best(holders, least), self._best(loaders, least)
        near = holder or loader
        if near is None:
            return self._best_on_ring({}, self._limit) or least
        limit = near.load_for(digest) - self._price(near)
        if least.load >= limit:
            return near
        if holder and loader and loader.load_for(digest) < limit and not loader.refused(digest, self._now):
            return loader
        further = self._best_on_ring({**holders, **loaders}, limit)
        if further is None and not (least.id in holders or least.id in loaders) and self._may_load(least):
            further = least  # the adapter is on all its next places already
        return further or near

    def _price(self, near: WorkerView) -> int:
        """By how much work `near`, which has the adapter or loads it, may be busier than a worker without it."""
        full = self._policy.load_price
        price = (full - self._demand.work) * SHARED // (SHARED + near.prompts_of(self._demand.digest))
        return max(full // CHEAPEST, price)

    def _known_prefix(self, near: Mapping[str, WorkerView]) -> WorkerView | None:
        """The one of `near` that has computed most of the prompt's beginning, takes the prompt and isn't too busy."""
        depths = self._view.prefixes.known(self._demand.beginnings)
        known = [worker for key in depths if (worker := near.get(key)) is not None and self._can_take(worker)]
        return max(known, key=lambda worker: (depths[worker.id], -worker.load), default=None)

    def _can_take(self, worker: WorkerView) -> bool:
        """Whether the worker takes the prompt now and isn't too busy."""
        return (
            worker.load <= self._limit
            and worker.worker.role is not Role.DECODE
            and self._is_usable(worker)
            and self._goes(worker)
        )

    def _best(self, near: Mapping[str, WorkerView], least: WorkerView) -> WorkerView | None:
        """The least loaded of `near` that takes the prompt now, or else that could compute it later.

        Of many workers, the choice looks at some, another few for each request, and at `least`.
        """
        some = list(near.values())
        if len(some) > LOOKS:
            start = self._demand.order[1] * LOOKS % len(some)
            some = (some + some)[start : start + LOOKS]
            if least.id in near:
                some.append(least)
        some.sort(key=_load)
        first = None
        for worker in some:
            if self._is_usable(worker):
                if self._goes(worker):
                    return worker
                first = first or worker
        return first

    def _best_on_ring(self, known: Mapping[str, WorkerView], limit: int) -> WorkerView | None:
        """The least loaded below `limit` of the adapter's first places on the ring that may load it, best with a slot.

        The load costs as much at one place as at another.
        """
        best = None
        for key in self._view.ring.places(self._demand.digest, RING_STEPS):
            worker = self._view.workers[key]
            if best is not None and worker.load >= best.load:
                continue
            if worker.load < limit and key not in known and self._is_usable(worker) and self._may_load(worker):
                best = worker
        return best

    def _may_load(self, worker: WorkerView) -> bool:
        """Whether the worker takes the prompt once it has loaded the adapter, and hasn't just failed to."""
        return self._goes(worker) and not worker.refused(self._demand.digest, self._now)

    def _goes(self, worker: WorkerView) -> bool:
        """Whether the worker takes the prompt now, and has a slot for its adapter."""
        return self._takes(worker) and (not self._demand.digest or self._has_slot(worker))

    def _is_usable(self, worker: WorkerView) -> bool:
        """Whether the worker could compute the prompt, now or later."""
        demand = self._demand
        return (
            worker.is_ready
            and worker.id not in self._avoided
            and self._staging_of(worker.worker) <= worker.worker.staging_bytes
            and (not demand.decodes or self._decode_of(worker) is not None)
        )

    def _open(self, worker: WorkerView) -> bool:
        """Whether the worker begins another prompt of this request's age."""
        if worker.prefills >= self._view.max_prefills or worker.id in self._avoided or worker.paused_until > self._now:
            return False
        return not self._kept(worker.memory_for)

    def _takes(self, worker: WorkerView) -> bool:
        return self._open(worker) and self._stages(worker)

    def _stages(self, worker: WorkerView) -> bool:
        """Whether the worker's staging memory has room for the prompt's KV."""
        return worker.has_staging(self._staging_of(worker.worker))

    def _staging_of(self, worker: Worker) -> int:
        """See `Demand.staging`. Workers of one fingerprint have KV blocks of one size."""
        size = self._staging.get(worker.fingerprint)
        if size is None:
            size = self._staging[worker.fingerprint] = self._demand.staging(worker)
        return size

    def _has_slot(self, worker: WorkerView) -> bool:
        """Whether the worker's engine can add one more prompt with this adapter to its batch."""
        slots = worker.worker.adapter_slots
        if not slots:
            return True
        if self._kept(worker.slot_for) or self._overtakes(worker):
            # but those that came before go with other routers' prompts, as in one line
            return self._demand.order[2] < worker.slot_shared(self._demand.digest)
        return worker.in_slot(self._demand.digest) or (worker.slots_used < slots and not worker.is_full)

    def _kept(self, waiting: Order | None) -> bool:
        """Whether an older request has waited so long that this one must not overtake it."""
        if waiting is None or self._demand.order <= waiting:
            return False
        return self._now - waiting[2] > self._policy.patience

    def _overtakes(self, worker: WorkerView) -> bool:
        """Whether another router's request has waited for a slot for much longer, so that this one must not take it.

        News of it is late. If requests of about the same age kept slots for each other, slots would be idle meanwhile.
        """
        return self._demand.order[0] - worker.other_slot_for > OTHERS * self._policy.patience

    def _decode_of(self, prefill: WorkerView) -> WorkerView | None:
        """The emptiest decode worker with room that takes KV from `prefill`."""
        fingerprint = prefill.worker.fingerprint
        if fingerprint not in self._decode:
            self._decode[fingerprint] = self._emptiest(fingerprint)
        return self._decode[fingerprint]

    def _emptiest(self, fingerprint: str) -> WorkerView | None:
        workers = self._view.decode.get(fingerprint, ())
        avoided = _avoided(self._demand, self._view, lambda: workers)
        return next((one for one in workers if one.id not in avoided and self._has_room(one)), None)

    def _has_room(self, view: WorkerView) -> bool:
        demand, worker = self._demand, view.worker
        batch = self._view.batch(worker)
        running = view.sequences + (view.status.other_sequences if view.status else 0)
        crowd = min(demand.choices, max(1, batch - worker.max_num_seqs))  # further choices wait in the engine
        return (
            view.blocks.taken + demand.blocks(worker) * demand.choices <= worker.kv_blocks
            and not (running and running + crowd > batch)
            and view.has_staging(self._staging_of(worker))
            and not self._kept(view.memory_for)
            and view.paused_until <= self._now
        )


def _avoided(demand: Demand, view: ClusterView, workers: Callable[[], Iterable[WorkerView]]) -> Set[str]:
    """The ids of those of `workers` that the request shouldn't use: as many kinds of them as leave a worker."""
    if demand.avoid or view.stalled:
        for ids in (demand.avoid | view.stalled, view.stalled, demand.avoid):
            if any(worker.id not in ids for worker in workers()):
                return ids
    return frozenset()


def _load(worker: WorkerView) -> tuple[int, int, str]:
    return worker.load, worker.status.running if worker.status else 0, worker.id
