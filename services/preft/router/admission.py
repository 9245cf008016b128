"""The bounded queue of requests in front of the workers.

The queue decides which waiting request is tried next, and refuses requests when it is full. The policy chooses workers.

Requests of one adapter wait in one line, in order of arrival. A line waits for one worker: that which has the adapter,
loads it, or should load it. If no worker has room for its head, whatever the adapter, the line waits for any. When a
worker gets room, only the lines that wait for it and those that wait for any are looked at, oldest first. When a line's
head goes, the requests behind it go with it as far as there is room, at most TURN: so requests of one adapter share a
slot. One rule prevents starvation: no later request takes a slot or memory that a request is waiting for longer than
the policy's patience.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable, Sequence

from preft.core.cluster import Role
from preft.core.errors import InvalidRequest, PreftError, QueueFull, Unavailable
from preft.core.request import AdapterRef
from preft.router.fair_share import FairShare
from preft.router.fits import check_fits
from preft.router.kept_room import KeptRoom
from preft.router.lease import Lease
from preft.router.lines import Line, Lines
from preft.router.policy import Absent, Crowded, Demand, Pair, Placement, Policy, Refusal
from preft.router.ticket import Ticket
from preft.router.view import ClusterView
from preft.router.worker_view import WorkerView

TURN = 32  # requests of one adapter that go together before older ones of other adapters
TRIES = 16  # lines that one look tries, and ...
LINES = 100  # lines that it reads, until it gives up: the others are younger, and their turn comes
HELPED = 4  # lines of other workers that a worker with room looks at
NO_WORKERS = "no prefill and decode workers that fit together are ready"
RETRY_AFTER = (1.0, 30.0)  # seconds, least and most


class Admission:
    """Owns the queue. `wake` tells it that a worker may have room; a released lease does so by itself."""

    def __init__(
        self,
        policy: Policy,
        view: ClusterView,
        max_queue: int,
        restart_grace: float,
        shares: FairShare,
        prefetch: Callable[[WorkerView, AdapterRef], None],
    ) -> None:
        """`max_queue` requests may wait. After `restart_grace` seconds without workers they get Unavailable.

        `shares` gives requests their order. `prefetch` makes a worker load an adapter. The owner calls `load_ended`
        when the load has succeeded or failed.
        """
        self._policy = policy
        self._view = view
        self.shares = shares
        self._prefetch = prefetch
        self._max_queue = max_queue
        self._restart_grace = restart_grace
        self.refused = 0  # requests for which there was no room in the queue
        self.leases = 0
        self.waited = 0.0  # seconds, of all leases together
        self._lines = Lines()
        self._kept = KeptRoom(view)
        self._grants: deque[float] = deque(maxlen=64)  # times of the last leases
        self._awake: dict[WorkerView, None] = {}  # workers that may have room
        self._ready: dict[str, None] = {}  # digests whose loads have ended
        self._blocked: Demand | None = None  # refused in this look: whatever covers it needn't be tried
        self._unchecked: list[Ticket] = []  # new requests that came while no workers were there
        self._pump_due = False
        self._serving_until = -math.inf
        self._closed: PreftError | None = None

    @property
    def waiting(self) -> int:
        return self._lines.waiting

    def oldest(self) -> float | None:
        """When the oldest waiting request came; None if none waits."""
        return min((line.head.demand.order[2] for line in self._lines), default=None)

    @property
    def closed(self) -> bool:
        return self._closed is not None

    @property
    def has_choice(self) -> bool:
        """Whether several workers compute prompts."""
        return self._view.several

    def enter(self, demand: Demand, choices: Sequence[int], *, started: bool = False) -> Ticket:
        """Queues `demand`, or gives its ticket a lease at once if there is room.

        `demand.order` holds when the request came. A request that has `started` before and lost its workers enters
        even a full queue. Requests wait for `restart_grace` seconds for workers that are gone. Raises QueueFull,
        Unavailable, the error of a closed queue, or InvalidRequest if no worker could ever hold the request.
        """
        if self._closed is not None:
            raise self._closed
        ticket = Ticket(demand, choices, self)
        if not started:
            if self._view.serving:
                check_fits(demand, self._view)
            elif self._is_abandoned():
                raise Unavailable(NO_WORKERS)
        line = self._lines.get(demand.digest)
        placed = None
        if not self._pump_due and (line is None or demand.order < line.head.demand.order):
            placed = self._grant(ticket)
            if isinstance(placed, Pair):
                return ticket
        if not started and self.waiting >= self._max_queue:
            ticket.outcome.cancel()
            self.refused += 1
            raise QueueFull(f"{self.waiting} requests are waiting for a worker already", self._retry_after())
        line = self._lines.add(ticket)
        if not started and not self._view.serving:
            self._unchecked.append(ticket)
        if placed is not None:  # else a look is due, or the line's head waits already
            self._refused(line, placed)
        return ticket

    def forget(self, ticket: Ticket) -> None:
        """Takes a waiting ticket out of the queue."""
        line = self._lines.get(ticket.demand.digest)
        at = line.at if line is not None else None
        if self._lines.remove(ticket):
            self._kept.give_up(ticket.demand.order, at)
            self.wake(at)

    def load_ended(self, worker: WorkerView, digest: str, error: PreftError | None) -> None:
        """Tells the queue that `worker` has loaded an adapter, or failed to (`error`; None also if it was lost).

        With an `error`, requests for this adapter fail, except those that another worker can still serve.
        """
        line = self._lines.get(digest)
        if error is not None and line is not None:
            for ticket in [ticket for ticket in line.tickets if not self._has_others(ticket)]:
                self._fail(ticket, error)
        self._ready[digest] = None
        self.wake(worker)

    def wake(self, worker: WorkerView | None = None) -> None:
        """Schedules one look at the queue, as `worker` may have room; several calls before it share the look."""
        if worker is not None and worker.worker.role is Role.DECODE and not self._lines.number_anywhere:
            return  # no line waits for one decode worker
        if worker is not None and self._lines:
            self._awake[worker] = None
        if self._lines and not self._pump_due and self._closed is None:
            self._pump_due = True
            asyncio.get_running_loop().call_soon(self._pump)

    def workers_changed(self) -> None:
        """Looks again at lines whose worker is gone or stalls, and fails all if no worker has been there for long."""
        if self._closed is not None:
            return
        if self._view.serving:
            self._serving_until = asyncio.get_running_loop().time()
            self._check()
        elif self._is_abandoned():
            self._refuse_all(Unavailable(NO_WORKERS))
        for line in self._lines:
            if line.at is not None and (not line.at.is_ready or line.at.is_stalled):
                self._move(line, None)
        self.wake()

    def _is_abandoned(self) -> bool:
        """Whether the workers have been gone for so long that nothing waits for them any more."""
        return asyncio.get_running_loop().time() - self._serving_until > self._restart_grace

    def _check(self) -> None:
        """Fails the requests that came while no workers were there, and that don't fit those that are there now."""
        unchecked, self._unchecked = self._unchecked, []
        for ticket in unchecked:
            try:
                check_fits(ticket.demand, self._view)
            except InvalidRequest as error:
                self._fail(ticket, error)

    def _fail(self, ticket: Ticket, error: PreftError) -> None:
        self.forget(ticket)
        ticket.fail(error)

    def close(self, error: PreftError) -> None:
        """Fails all waiting requests and all later ones with `error`."""
        self._closed = error
        self._refuse_all(error)

    # One look at the queue

    def _pump(self) -> None:
        self._pump_due = False
        awake = [worker for worker in self._awake if self._view.workers.get(worker.id) is worker]
        ready, self._ready = self._ready, {}
        self._awake.clear()
        self._blocked = None
        for worker in awake:
            if self._lines.number_at(worker):
                self._serve(worker)
        self._serve(None)
        for digest in ready:
            self._try(self._lines.get(digest))
        for worker in awake:
            self._help(worker)

    def _serve(self, worker: WorkerView | None) -> None:
        """Gives leases to the lines that wait for `worker` and for any, oldest first, while they fit."""
        skipped = {worker: 0, None: 0}
        tries = moves = 0
        while tries < TRIES and sum(skipped.values()) < LINES and (line := self._next(worker, skipped)) is not None:
            at, head = line.at, line.head
            is_blocked = self._is_blocked(line)
            if is_blocked and at is not None:
                self._move(line, None)  # the room that it lacks isn't this worker's
                continue
            if is_blocked or self._is_absent(line):
                skipped[at] += 1
                continue
            tries += 1
            placed = self._go(line)
            if placed is not None and line.at is at and line.head is head:
                skipped[at] += 1
            else:
                moves += 1
            if placed is None:
                continue
            if isinstance(placed, Refusal) and not line.head.demand.avoid:
                if placed is Refusal.NO_PREFILL:
                    break
                self._blocked = line.head.demand
            if isinstance(placed, Crowded) and placed.worker is worker:
                self._share(worker)
                skipped[worker] = self._lines.number_at(worker)
        if worker is not None:
            self._load_ahead(worker)
        if moves and tries == TRIES:
            self.wake(worker)  # the others are tried in the next look, so that one look stays short

    def _next(self, worker: WorkerView | None, skipped: dict[WorkerView | None, int]) -> Line | None:
        """The older of two lines: the next one that waits for `worker`, and the next one that waits for any."""
        lines = [self._lines.oldest(at, number) for at, number in skipped.items()]
        return min((line for line in lines if line is not None), key=lambda line: line.head.demand.order, default=None)

    def _is_blocked(self, line: Line) -> bool:
        """Whether an older request that asks less had no room on any worker in this look."""
        blocked, demand = self._blocked, line.head.demand
        return blocked is not None and demand.order > blocked.order and demand.covers(blocked)

    def _is_absent(self, line: Line) -> bool:
        """Whether the line can't go: no worker has its adapter, and the line's worker loads it or can't load it now."""
        if line.at is None or line.digest in self._view.holders or line.head.demand.adapter is None:
            return False
        return line.at.is_loading(line.digest) or not self._may_load(line.at)

    def _share(self, worker: WorkerView) -> None:
        """Lets requests go whose adapters have a slot of `worker` already, also for another router's requests."""
        for digest in worker.slots:
            self._try(self._lines.get(digest))

    def _help(self, worker: WorkerView) -> None:
        """Lets a worker that has room take over from others, if the policy thinks so."""
        if worker.id in self._view.prefill and not self._lines.number_at(worker):
            self._share(worker)
            for line in self._lines.elsewhere(worker, HELPED):
                can_go = line.tickets and not (self._is_blocked(line) or self._is_absent(line))
                if can_go and self._can_help(worker, line):
                    self._try(line)

    def _can_help(self, worker: WorkerView, line: Line) -> bool:
        """Whether the worker has the adapter, or is less busy than the line's, and no load will let the line go."""
        if worker.holds(line.digest) or line.at is None:
            return True
        if worker.load >= line.at.load_for(line.digest):
            return False
        return not any(line.digest in one.loads for one in self._view.loaders.get(line.digest, {}).values())

    def _try(self, line: Line | None) -> None:
        """Lets a line's requests go out of turn."""
        if line is not None:
            at, head = line.at, line.head
            has_kept = self._kept.has(head.demand.order, at)
            self._go(line)
            if has_kept and not self._kept.has(head.demand.order, at):
                self.wake(at)  # the oldest of the others that wait for the same room is next

    def _go(self, line: Line) -> Placement | None:
        """Gives leases to the line's requests in turn. Returns None if none is left, or what the next one waits for."""
        for _ in range(TURN):
            ticket = line.head
            placed = self._grant(ticket)
            if placed is not None and not isinstance(placed, Pair):
                self._refused(line, placed)
                return placed
            at = line.at
            self._lines.remove(ticket)
            self._kept.give_up(ticket.demand.order, at)
            if at is not None and placed is not None and placed.prefill is not at:
                self.wake(at)  # its other lines have less before them
            if not line.tickets:
                return None
        self.wake(line.at)
        return None

    def _grant(self, ticket: Ticket) -> Placement | None:
        """Gives `ticket` a lease, or returns what the policy said instead. Returns None for an ended ticket."""
        if ticket.outcome.done():
            return None  # the waiting task was just cancelled, and hasn't left the queue yet
        now = asyncio.get_running_loop().time()
        placed = self._policy.place(ticket.demand, self._view, now)
        if isinstance(placed, Pair):
            ticket.outcome.set_result(Lease(placed, ticket.demand, ticket.choices, self.wake))
            self._view.prefixes.add(ticket.demand.beginnings, placed.prefill.id)
            self._grants.append(now)
            self.leases += 1
            self.waited += now - ticket.entered
            self.shares.leased(now, ticket.demand.kv_tokens, waiting=self.waiting)
        return placed

    def _refused(self, line: Line, placed: Placement) -> None:
        """Files the line where its head has to wait, and makes a worker load its adapter."""
        demand = line.head.demand
        if isinstance(placed, Absent):
            self._load(placed.worker, demand)
            is_loading = line.at is None or not line.at.holds(line.digest)
            if is_loading and self._kept.has(line.head.demand.order, line.at):  # nothing is kept while an adapter loads
                self._kept.give_up(line.head.demand.order, line.at)
                self.wake()
            if not self._stays(line, placed.worker):
                self._move(line, placed.worker)
        elif isinstance(placed, Crowded):
            worker = line.at if line.at is not None and self._stays(line, placed.worker) else placed.worker
            self._move(line, worker)
            worker.slot_for = min(worker.slot_for or demand.order, demand.order)
            if not worker.has_staging(demand.staging(worker.worker)):
                self._kept.keep(Refusal.NO_STAGING, worker, demand.order)
        elif isinstance(placed, Refusal):
            self._move(line, None)
            if demand.adapter is not None:
                home = self._policy.home(demand, self._view, asyncio.get_running_loop().time())
                if home is not None:
                    self._load(home, demand)
            self._kept.want(demand, placed)

    def _stays(self, line: Line, worker: WorkerView) -> bool:
        """Whether the line's worker is as good as `worker`, as seen without the line itself.

        The line counts as load where it waits. Without this rule it would look better elsewhere, wherever it is.
        """
        at, digest = line.at, line.digest
        if at is None or not at.is_ready or at.is_stalled or at.id in line.head.demand.avoid:
            return False
        here, there = ((one.holds(digest), one.is_loading(digest)) for one in (at, worker))
        return here > there or (here == there and at.load_for(digest) <= worker.load)

    def _move(self, line: Line, at: WorkerView | None) -> None:
        before = line.at
        self._lines.move(line, at)
        if before is not None and before is not at:
            if any(ticket.demand.order == before.slot_for for ticket in line.tickets):
                before.slot_for = None
            self.wake(before)

    def _load(self, worker: WorkerView, demand: Demand) -> None:
        """Makes `worker` load the adapter, unless it loads many already: then `_load_ahead` does it later."""
        if demand.adapter is not None and not worker.is_loading(demand.digest) and self._may_load(worker):
            self._prefetch(worker, demand.adapter)

    def _may_load(self, worker: WorkerView) -> bool:
        return len(worker.loads) < worker.most_loads

    def _load_ahead(self, worker: WorkerView) -> None:
        for line in self._lines.first_at(worker, worker.most_loads):
            if line.digest not in self._view.holders and line.digest not in self._view.loaders:
                self._load(worker, line.head.demand)

    def _has_others(self, ticket: Ticket) -> bool:
        """Whether another worker holds or loads the ticket's adapter."""
        digest = ticket.demand.digest
        near = {**self._view.holders.get(digest, {}), **self._view.loaders.get(digest, {})}
        return any(one.is_ready and one.id not in ticket.demand.avoid for one in near.values())

    def _retry_after(self) -> float:
        """Seconds until half the queue is served, at the rate of the last leases."""
        least, most = RETRY_AFTER
        if len(self._grants) < 2:
            return least
        elapsed = asyncio.get_running_loop().time() - self._grants[0]
        return min(most, max(least, math.ceil(self.waiting / 2 * elapsed / len(self._grants))))

    def _refuse_all(self, error: PreftError) -> None:
        self._unchecked.clear()
        for line in self._lines:
            for ticket in self._lines.take(line.digest):
                self._kept.give_up(ticket.demand.order, line.at)
                ticket.fail(error)
