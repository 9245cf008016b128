"""One worker in the router's picture: what it tells, and what this router has reserved there.

A `WorkerView` joins a worker's registration, its status stream and this router's own reservations, so that placement
needn't wait for news. It only records; `view.ClusterView` holds all workers, with indexes.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from preft.core.cluster import AdapterState, Role, StatusUpdate, Worker, WorkerSeen, WorkerState, WorkerStatus

if TYPE_CHECKING:
    from preft.router.view import ClusterView

WORK_TOKENS = 256  # of a prompt: as much work as the prompt as such
AHEAD = 2  # times its slots: adapters that a worker loads before they have a slot
REFUSED_SECONDS = 3.0  # until a worker that failed to load an adapter is asked again
BREAK_SECONDS = (0.25, 30.0)  # a failing worker's pause: after the second failure in a row, and at most

T = TypeVar("T")
Order = tuple[float, int, float]
"""A request's place in the queue: when it counts as having come, a serial number, and when it came (loop times)."""


class Memory:
    """One kind of memory of a worker: used by this router (own), and elsewhere (foreign).

    Status messages report the total use, and are late: the reported use may include reservations of ours that have
    ended since. So only use beyond our own peak since the previous message counts as foreign.
    """

    __slots__ = ("_foreign", "_peak", "own")

    def __init__(self) -> None:
        self.own = 0
        self._peak = 0  # most own since the last message
        self._foreign = 0

    @property
    def taken(self) -> int:
        return self.own + self._foreign

    def add(self, amount: int) -> None:
        """Reserves `amount`, or gives it back if negative. Raises ValueError if more is given back than was taken."""
        self.own += amount
        if self.own < 0:
            raise ValueError("more memory is given back than was taken")
        self._peak = max(self._peak, self.own)

    def told(self, used: int) -> None:
        """Takes the total use of a new message."""
        self._foreign = max(0, used - self._peak)
        self._peak = self.own


@dataclass(slots=True, eq=False)
class WorkerView:
    """One worker. Times are in loop time.

    `queued` is the work of the waiting requests that the queue has assigned to the worker. `memory_for` is the oldest
    request for which its memory is kept. `wants_changed` is set at each change of `wanted` and `slot_for`.
    """

    worker: Worker
    cluster: ClusterView | None
    id: str = field(init=False)
    heard: float = 0.0  # when the worker told last, or was registered
    status: WorkerStatus | None = None  # None: the worker hasn't told yet, or its stream broke
    adapters: dict[str, AdapterState] = field(default_factory=dict)  # as told
    # Own reservations:
    prefills: int = 0
    work: int = 0  # of prompts that aren't computed
    sequences: int = 0
    blocks: Memory = field(default_factory=Memory)
    staging: Memory = field(default_factory=Memory)
    queued: int = 0
    _slot_for: Order | None = None
    other_slot_for: float = math.inf  # since when another router's request has waited for a slot
    memory_for: Order | None = None
    _waiting: dict[str, tuple[int, int]] = field(default_factory=dict)  # requests and their work, by digest
    _own_prompts: Counter[str] = field(default_factory=Counter)
    _other_prompts: dict[str, int] = field(default_factory=dict)
    _slot_shared: dict[str, float] = field(default_factory=dict)  # see `slot_shared`
    wants_changed: asyncio.Event = field(default_factory=asyncio.Event)
    # Loads that this router has asked for:
    loads: set[str] = field(default_factory=set)
    _loaded: set[str] = field(default_factory=set)  # ended, and not told yet
    _refused: dict[str, float] = field(default_factory=dict)  # until
    # Failures:
    is_full: bool = False  # the worker has refused an adapter for want of a slot, and told nothing since
    failures: int = 0  # in a row
    paused_until: float = 0.0

    def __post_init__(self) -> None:
        self.id = self.worker.id

    @property
    def state(self) -> WorkerState:
        if not self.worker.address:
            return WorkerState.STARTING
        if self.status is None:
            return WorkerState.DEAD
        return WorkerState.DRAINING if self.status.draining else WorkerState.READY

    @property
    def is_ready(self) -> bool:
        return self.status is not None and not self.status.draining

    @property
    def is_stalled(self) -> bool:
        """Whether the worker's engine makes no step now: the worker gets requests only if no other takes them."""
        return self.status is not None and self.status.stalled_seconds > 0

    def seen(self, now: float) -> WorkerSeen:
        """The worker's state for people and programs outside."""
        return WorkerSeen(self.worker, self.state, self.status or WorkerStatus(), now - self.heard)

    @property
    def idle(self) -> bool:
        """Whether this router has nothing reserved here."""
        return not (self.prefills or self.sequences or self.blocks.own or self.staging.own or self._own_prompts)

    @property
    def load(self) -> int:
        """The work of prompts that the worker computes, other routers' too, and of own ones that wait for it."""
        status = self.status
        others = work_of(status.other_prompts, status.other_prompt_tokens) if status else 0
        return self.work + self.queued + others

    def load_for(self, digest: str) -> int:
        """The load that a request of this adapter meets: without those that wait in its own line."""
        return self.load - self._waiting[digest][1] if digest in self._waiting else self.load

    # Adapters

    def holds(self, digest: str) -> bool:
        """Whether the worker has the adapter in memory: it says so, has just loaded it, or runs prompts with it."""
        state = self.adapters.get(digest)
        return digest in self._loaded or digest in self._own_prompts or (state or _LOADING) is not _LOADING

    def is_loading(self, digest: str) -> bool:
        return digest in self.loads or self.adapters.get(digest) is _LOADING

    @property
    def most_loads(self) -> int:
        """Adapters that this router makes the worker load at once."""
        return max(2, AHEAD * self.worker.adapter_slots)

    def refused(self, digest: str, now: float) -> bool:
        """Whether the worker has failed to load the adapter a moment ago."""
        return self._refused.get(digest, now) > now

    def load_begins(self, digest: str) -> None:
        """Records that this router asks the worker to load the adapter."""
        self.loads.add(digest)
        self._place(digest)

    def load_ended(self, digest: str, now: float, *, done: bool) -> None:
        """Records the worker's answer: loaded (`done`) or refused."""
        self.loads.discard(digest)
        self._refused = {key: until for key, until in self._refused.items() if key != digest and until > now}
        if done:
            self._loaded.add(digest)
        else:
            self._refused[digest] = now + REFUSED_SECONDS
        self._place(digest)

    @property
    def slots_used(self) -> int:
        """Distinct adapters of prompts that aren't computed yet, of all routers."""
        own = self._own_prompts
        others = sum(digest not in own for digest in self._other_prompts) if self._other_prompts else 0
        return others + len(own) - ("" in own)

    def in_slot(self, digest: str) -> bool:
        """Whether a prompt that isn't computed yet uses the adapter."""
        return digest in self._own_prompts or digest in self._other_prompts

    def prompts_of(self, digest: str) -> int:
        """Prompts with the adapter that aren't computed yet, and of this router those that wait for the worker."""
        waiting, _ = self._waiting.get(digest, (0, 0))
        return self._own_prompts[digest] + self._other_prompts.get(digest, 0) + waiting

    def slot_shared(self, digest: str) -> float:
        """When the worker told that the adapter had got a slot for other routers' prompts; -inf if this hasn't been so.

        It holds until the adapter leaves its slot.
        """
        return self._slot_shared.get(digest, -math.inf)

    @property
    def wanted(self) -> list[str]:
        """Adapters for which requests of this router wait for the worker, the longest first."""
        return [digest for digest in self._waiting if digest]

    @property
    def slot_for(self) -> Order | None:
        """The oldest request of this router that waits for one of the worker's adapter slots."""
        return self._slot_for

    @slot_for.setter
    def slot_for(self, order: Order | None) -> None:
        if order != self._slot_for:
            self._slot_for = order
            self.wants_changed.set()

    @property
    def slots(self) -> list[str]:
        """The adapters of prompts that aren't computed yet, of all routers."""
        return [digest for digest in {**self._own_prompts, **self._other_prompts} if digest]

    # Reservations

    def has_staging(self, size: int) -> bool:
        """Whether `size` bytes of staging memory are free, and in one piece as far as the worker has told."""
        total, status = self.worker.staging_bytes, self.status
        if not size:
            return True
        in_pieces = status is not None and status.staging_bytes_fit < size <= total - status.staging_bytes_used
        return self.staging.taken + size <= total and not in_pieces

    def add_prefill(self, digest: str, work: int = 1) -> None:
        self.prefills += 1
        self.work += work
        self._own_prompts[digest] += 1
        if self._own_prompts[digest] == 1:
            self._place(digest)
        self._moved()

    def drop_prompt(self, digest: str, work: int = 1) -> None:
        """The prompt of one prefill is computed, and no longer needs its adapter."""
        if self._own_prompts[digest] < 1:
            raise ValueError(f"{self.id} has no prompt of adapter {digest!r} that could end")
        self._own_prompts[digest] -= 1
        if not self._own_prompts[digest]:
            del self._own_prompts[digest]
            self._place(digest)
            if not self.in_slot(digest):
                self._slot_shared.pop(digest, None)
        self.work -= work
        self._moved()

    def drop_prefill(self) -> None:
        """One prefill has ended, after its prompt."""
        if self.prefills < 1:
            raise ValueError(f"{self.id} has no prefill that could end")
        self.prefills -= 1
        self._moved()

    def add_sequences(self, number: int, blocks: int) -> None:
        """Reserves KV blocks for `number` more choices (negative: gives them back); 0: a running choice has grown."""
        self.sequences += number
        self.blocks.add(blocks)
        if self.sequences < 0:
            raise ValueError(f"{self.id} has no choice that could end")
        self._moved()

    def queue(self, digest: str, number: int, work: int) -> None:
        """Counts requests of one adapter that begin (or, negative, cease) to wait for this worker, and their work."""
        waiting, queued = self._waiting.get(digest, (0, 0))
        if not waiting or not waiting + number:
            self.wants_changed.set()
        if waiting + number:
            self._waiting[digest] = waiting + number, queued + work
        else:
            self._waiting.pop(digest, None)
        self.queued += work
        self._moved()

    # News

    def told(self, update: StatusUpdate, now: float = 0.0) -> None:
        """Takes one message of the worker's status stream."""
        before, was_stalled = self.status, self.is_stalled
        self.heard = now
        self.status = update.status
        waited = update.status.other_slot_wait_ms / 1000
        self.other_slot_for = now - waited if waited else math.inf
        self.is_full = False
        if self.worker.role is not Role.PREFILL:  # KV blocks of prefill workers are not reserved
            self.blocks.told(update.status.kv_blocks_used)
        self.staging.told(update.status.staging_bytes_used)
        changed = set(update.adapters)
        if update.is_whole:
            changed |= self.adapters.keys() | self._loaded | self._other_prompts.keys()
            self.adapters.clear()
            self._other_prompts.clear()
            self._slot_shared.clear()
        for digest, adapter in update.adapters.items():
            was_in_slot = self.in_slot(digest)
            _set(self.adapters, digest, adapter.state)
            _set(self._other_prompts, digest, adapter.other_prompts)
            if not self.in_slot(digest):
                self._slot_shared.pop(digest, None)
            elif not was_in_slot:
                self._slot_shared[digest] = now
        self._loaded -= changed
        for digest in changed:
            self._place(digest)
        if before is None or before.draining != update.status.draining or was_stalled != self.is_stalled:
            self._entered()
        else:
            self._moved()

    def lost(self, now: float) -> None:
        """A call to the worker broke, or its status stream: the worker gets no requests until it tells again."""
        if self.status is not None:
            self.status = None
            self._entered()
            self.failed(now)

    def failed(self, now: float) -> None:
        """Counts a failure. From the second in a row on, the worker gets no requests for a growing time.

        What fails during a pause began before it, and isn't counted.
        """
        if now < self.paused_until:
            return
        self.failures += 1
        if self.failures > 1:
            least, most = BREAK_SECONDS
            self.paused_until = now + min(most, least * 2 ** min(self.failures - 2, 16))

    def succeeded(self) -> None:
        """Ends a row of failures: the worker has computed a token."""
        self.failures, self.paused_until = 0, 0.0

    def _place(self, digest: str) -> None:
        if self.cluster is not None and digest:
            self.cluster.place_adapter(self, digest)

    def _entered(self) -> None:
        if self.cluster is not None:
            self.cluster.enter(self)

    def _moved(self) -> None:
        if self.cluster is not None:
            self.cluster.move(self)


def work_of(prompts: int, tokens: int) -> int:
    """The share of prompts in a prefill worker's load, given their number and all their tokens."""
    return prompts + tokens // WORK_TOKENS


_LOADING = AdapterState.LOADING


def _set(mapping: dict[str, T], key: str, value: T | None) -> None:
    if value:
        mapping[key] = value
    else:
        mapping.pop(key, None)
