"""The bounded queue of requests in front of the workers.

The queue owns the order of requests and refuses requests when it is full. The policy chooses workers. Requests for one
adapter are served in order of arrival. An adapter that isn't in memory yet, or whose next request fits nowhere, doesn't
delay other adapters. To prevent starvation of large requests, a request that has waited PATIENCE seconds keeps one
worker free of other requests until it fits. To prevent starvation of new adapters, a request that has waited
SLOT_PATIENCE seconds keeps one prefill worker's adapter slots free of younger requests.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import math
from collections import deque
from collections.abc import Callable, Sequence

from preft.core.cluster import Role, Worker
from preft.core.errors import DeadlineExceeded, InvalidRequest, PreftError, QueueFull, Unavailable
from preft.core.request import AdapterRef
from preft.router.lease import Lease
from preft.router.ledger import Ledger
from preft.router.policy import Absent, Crowded, Demand, Pair, Policy, Refusal, Roster

PATIENCE = 5.0  # seconds until a waiting request reserves a worker
SLOT_PATIENCE = 0.5  # seconds until a request that waits for an adapter slot keeps younger requests off the slots
RETRY_AFTER = (1.0, 30.0)  # seconds, least and most


class Ticket:
    """One request's place in the queue, and then its lease."""

    def __init__(
        self, demand: Demand, choices: Sequence[int], order: tuple[float, int], avoid: frozenset[str], queue: Admission
    ) -> None:
        self.demand = demand
        self.choices = choices
        self.order = order
        self.avoid = avoid
        self.outcome: asyncio.Future[Lease] = asyncio.get_running_loop().create_future()
        self._queue = queue
        self._ended = False

    async def wait(self, timeout: float) -> Lease:
        """Returns the lease once there is room; the caller releases it. Cancelling the wait leaves the queue.

        Raises DeadlineExceeded after `timeout` seconds, and Unavailable if no workers came back in time.
        """
        try:
            async with asyncio.timeout(timeout):
                lease = await self.outcome
        except TimeoutError as error:
            self.cancel()
            raise DeadlineExceeded("the request's time limit passed while it waited for a worker") from error
        except BaseException:
            self.cancel()
            raise
        self._ended = True
        return lease

    def fail(self, error: PreftError) -> None:
        """Makes `wait` raise `error`, unless the ticket has a lease or has ended."""
        if not self.outcome.done():
            self.outcome.set_exception(error)

    def cancel(self) -> None:
        """Leaves the queue at once, and releases a lease that `wait` hasn't returned. `wait` then ends as cancelled."""
        if self._ended:
            return
        self._ended = True
        self._queue.forget(self)
        if not self.outcome.cancel() and not self.outcome.cancelled() and self.outcome.exception() is None:
            self.outcome.result().release()


class Admission:
    """Owns the queue. `update` brings a new view of the cluster; a released lease wakes the queue by itself."""

    def __init__(
        self,
        policy: Policy,
        ledger: Ledger,
        max_queue: int,
        restart_grace: float,
        prefetch: Callable[[Worker, AdapterRef], None],
    ) -> None:
        """`max_queue` requests may wait. After `restart_grace` seconds without workers they get Unavailable.

        `prefetch` makes a worker load an adapter. The owner calls `load_ended` when the load has succeeded or failed.
        """
        self._policy = policy
        self._prefetch = prefetch
        self._ledger = ledger
        self._max_queue = max_queue
        self._restart_grace = restart_grace
        self._roster = Roster((), {}, {})
        self._open = self._roster  # without the worker that is reserved for a request that has waited long
        self._queues: dict[str, deque[Ticket]] = {}  # by adapter digest, never empty
        self._crowded: dict[str, str] = {}  # digest -> the one worker whose slots its queue waits for
        self._waiting = 0
        self._serial = itertools.count()
        self._grants: deque[float] = deque(maxlen=64)  # times of the last leases
        self._pump_due = False
        self._serving_until = -math.inf
        self._closed: PreftError | None = None

    @property
    def waiting(self) -> int:
        return self._waiting

    @property
    def roster(self) -> Roster:
        """The cluster as of the last `update`."""
        return self._roster

    def update(self, roster: Roster) -> None:
        """Replaces the view of the cluster. Does nothing once closed."""
        if self._closed is not None:
            return
        now = asyncio.get_running_loop().time()
        self._roster = self._open = roster
        self._crowded.clear()
        if roster.serving:
            self._serving_until = now
        elif now - self._serving_until > self._restart_grace:
            self._refuse_all(Unavailable("no prefill and decode workers that fit together are ready"))
        self.wake()

    def enter(
        self,
        demand: Demand,
        choices: Sequence[int],
        *,
        since: float,
        started: bool = False,
        avoid: frozenset[str] = frozenset(),
    ) -> Ticket:
        """Queues `demand`, or gives its ticket a lease at once if there is room.

        `since` (loop time) is when the request came. A request that has `started` before and lost its workers enters
        even a full queue, ahead of its adapter's other requests, and waits for workers to restart. `avoid` holds the
        ids of workers that have failed this request. Raises QueueFull, Unavailable, or InvalidRequest if no worker
        could ever hold the request. A closed queue raises the error that `close` was given.
        """
        if self._closed is not None:
            raise self._closed
        if not started:
            if not self._roster.serving:
                raise Unavailable("no prefill and decode workers that fit together are ready")
            self._check_fits(demand)
        ticket = Ticket(demand, choices, (since, next(self._serial)), avoid, self)
        overtakes_nobody = not self._pump_due and demand.digest not in self._queues
        if overtakes_nobody and self._grant(ticket, self._open) is None:
            return ticket
        if not started and self._waiting >= self._max_queue:
            ticket.outcome.cancel()
            raise QueueFull(f"{self._waiting} requests are waiting for a worker already", self._retry_after())
        if demand.adapter is not None and demand.digest not in self._queues:
            home = self._policy.home(demand, self._roster, self._ledger)
            if home is not None:
                self._prefetch(home, demand.adapter)
        queue = self._queues.setdefault(demand.digest, deque())
        if started:
            queue.appendleft(ticket)
        else:
            queue.append(ticket)
        self._waiting += 1
        return ticket

    def forget(self, ticket: Ticket) -> None:
        """Takes a waiting ticket out of the queue."""
        queue = self._queues.get(ticket.demand.digest)
        if queue is not None and ticket in queue:
            queue.remove(ticket)
            self._waiting -= 1
            self._crowded.pop(ticket.demand.digest, None)
            if not queue:
                del self._queues[ticket.demand.digest]
            self._open = self._roster  # the ticket may have had a worker reserved
            self.wake()

    def load_ended(self, digest: str, error: PreftError | None) -> None:
        """Tells the queue that a worker has loaded an adapter, or failed to (`error`).

        With an `error`, requests for this adapter fail, except those that another worker can still serve.
        """
        self._crowded.pop(digest, None)
        if error is not None and (queue := self._queues.pop(digest, None)):
            self._waiting -= len(queue)
            going: deque[Ticket] = deque()
            for ticket in queue:
                if self._has_others(ticket):
                    going.append(ticket)
                else:
                    ticket.fail(error)
            if going:
                self._queues[digest] = going
                self._waiting += len(going)
        self.wake()

    def wake(self) -> None:
        """Schedules one pass over the queue; several calls before the pass share it."""
        if not self._queues:
            self._keep_nothing()
        elif not self._pump_due:
            self._pump_due = True
            asyncio.get_running_loop().call_soon(self._pump)

    def close(self, error: PreftError) -> None:
        """Fails all waiting requests and all later ones with `error`."""
        self._closed = error
        self._roster = self._open = Roster((), {}, {})
        self._refuse_all(error)

    def _pump(self) -> None:
        """Gives leases to all requests that fit, oldest first."""
        self._pump_due = False
        self._keep_nothing()
        now = asyncio.get_running_loop().time()
        heads = [(queue[0].order, queue) for queue in self._queues.values()]
        heapq.heapify(heads)
        refused: Demand | None = None  # a demand that covers this one needn't be tried
        crowded: set[str] = set()  # workers whose slots an older request waits for
        while heads:
            _, queue = heads[0]
            ticket = queue[0]
            digest = ticket.demand.digest
            if (refused is not None and ticket.demand.covers(refused)) or self._crowded.get(digest) in crowded:
                heapq.heappop(heads)
                continue
            refusal = self._grant(ticket, self._open)
            if refusal is None:
                queue.popleft()
                self._waiting -= 1
                if queue:
                    heapq.heapreplace(heads, (queue[0].order, queue))
                else:
                    heapq.heappop(heads)
                    del self._queues[digest]
                continue
            heapq.heappop(heads)
            if refusal is Refusal.NO_PREFILL and not ticket.avoid:
                break
            if isinstance(refusal, Refusal) and not ticket.avoid:
                refused = ticket.demand
            waited = now - ticket.order[0]
            if isinstance(refusal, Crowded):
                if len(self._roster.holders.get(digest, ())) < 2:
                    self._crowded[digest] = refusal.worker.id
                crowded.add(refusal.worker.id)
                if waited > SLOT_PATIENCE:
                    self._ledger.keep_slots(refusal.worker.id)
            lacks_memory = refusal in (Refusal.NO_STAGING, Refusal.NO_DECODE)
            if lacks_memory and waited > PATIENCE and self._open is self._roster:
                self._open = self._keep_one_for(ticket.demand, refusal)

    def _grant(self, ticket: Ticket, roster: Roster) -> Refusal | Absent | Crowded | None:
        """Gives `ticket` a lease and returns None, or returns why there is none. Returns None for an ended ticket."""
        if ticket.outcome.done():
            return None  # the waiting task was just cancelled, and hasn't left the queue yet
        self._crowded.pop(ticket.demand.digest, None)
        placed = self._policy.place(ticket.demand, roster, self._ledger, ticket.avoid)
        if isinstance(placed, Absent) and ticket.demand.adapter is not None:
            self._prefetch(placed.worker, ticket.demand.adapter)
        if not isinstance(placed, Pair):
            return placed
        ticket.outcome.set_result(Lease(placed, ticket.demand, ticket.choices, self._ledger, self.wake))
        self._grants.append(asyncio.get_running_loop().time())
        return None

    def _has_others(self, ticket: Ticket) -> bool:
        """Whether another worker holds or loads the ticket's adapter. A worker that just refused doesn't count."""
        if self._policy.home(ticket.demand, self._roster, self._ledger) is not None:
            return False
        placed = self._policy.place(ticket.demand, self._roster, self._ledger, ticket.avoid)
        return not (isinstance(placed, Absent) and self._ledger.refused(placed.worker.id, ticket.demand.digest))

    def _keep_nothing(self) -> None:
        self._open = self._roster
        self._ledger.keep_no_slots()

    def _keep_one_for(self, demand: Demand, refusal: Refusal | Absent | Crowded) -> Roster:
        """The roster without one worker: of those that could hold `demand`, the one whose memory is least used."""
        if refusal is Refusal.NO_STAGING:
            able = [worker for worker in self._roster.prefill if _stages(worker, demand)]
            if not able:
                return self._roster
            return self._roster.without_prefill(min(able, key=lambda worker: self._ledger.staging(worker.id)))
        able = [
            worker
            for worker in self._decode_workers()
            if _holds(worker, demand.blocks(worker) * demand.choices) and _stages(worker, demand)
        ]
        if not able:
            return self._roster
        emptiest = min(able, key=lambda worker: self._ledger.blocks(worker.id) / worker.load.kv_blocks_total)
        return self._roster.without_decode(emptiest)

    def _check_fits(self, demand: Demand) -> None:
        workers = self._decode_workers()
        if not demand.decodes or not workers:
            return
        for role, members in ((Role.PREFILL, self._roster.prefill), (Role.DECODE, workers)):
            if not any(_stages(worker, demand) for worker in members):
                room = max(worker.load.staging_bytes_total for worker in members)
                raise InvalidRequest(
                    f"the KV cache of a prompt of {demand.prompt_tokens} tokens doesn't fit into the {room} bytes of "
                    f"staging memory of any {role} worker: raise {role}.staging_bytes",
                    param="prompt",
                )
        if not any(_holds(worker, worker.blocks(demand.max_tokens)) for worker in workers):
            room = max(worker.load.kv_blocks_total * worker.block_size for worker in workers)
            raise InvalidRequest(
                f"prompt and max_tokens come to {demand.max_tokens} tokens, no decode worker holds more than {room}",
                param="max_tokens",
            )
        if not any(_holds(worker, demand.blocks(worker) * demand.choices) for worker in workers):
            raise InvalidRequest(
                f"no decode worker can hold {demand.choices} choices of {demand.kv_tokens} tokens at once", param="n"
            )

    def _decode_workers(self) -> list[Worker]:
        return [worker for workers in self._roster.decode.values() for worker in workers]

    def _retry_after(self) -> float:
        """Seconds until half the queue is served, at the rate of the last leases."""
        least, most = RETRY_AFTER
        if len(self._grants) < 2:
            return least
        elapsed = asyncio.get_running_loop().time() - self._grants[0]
        return min(most, max(least, math.ceil(self._waiting / 2 * elapsed / len(self._grants))))

    def _refuse_all(self, error: PreftError) -> None:
        queues, self._queues, self._waiting = self._queues, {}, 0
        for queue in queues.values():
            for ticket in queue:
                ticket.fail(error)


def _holds(worker: Worker, blocks: int) -> bool:
    return blocks <= worker.load.kv_blocks_total


def _stages(worker: Worker, demand: Demand) -> bool:
    return demand.staging(worker) <= worker.load.staging_bytes_total
