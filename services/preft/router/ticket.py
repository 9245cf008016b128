"""One request's place in the queue. `admission` owns the queue, and gives the ticket its lease."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING

from preft.core.errors import DeadlineExceeded, PreftError
from preft.router.lease import Lease
from preft.router.policy import Demand

if TYPE_CHECKING:
    from preft.router.admission import Admission


class Ticket:
    """One request's place in the queue, and then its lease."""

    def __init__(self, demand: Demand, choices: Sequence[int], queue: Admission) -> None:
        self.demand = demand
        self.choices = choices
        loop = asyncio.get_running_loop()
        self.entered = loop.time()
        self.outcome: asyncio.Future[Lease] = loop.create_future()
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
