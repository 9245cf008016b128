"""The order of waiting requests: by time, shifted by priority, and by each tenant's share of the cluster.

Start-time fair queueing (Goyal, Vin and Cheng, 1996) with the clock as virtual time: a request counts as having come
when its tenant's earlier requests would be done, if the tenant had its share of the cluster alone. So a tenant that
sends a thousand requests at once waits behind itself, and others go in between. Without a queue nothing changes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from itertools import count

from preft.router.worker_view import Order

SAMPLES = 64  # leases from which the cluster's speed is taken
FEWEST = 8
PRIORITY_SECONDS = 1.0  # how much later (or, negative, earlier) a request counts as having come, per step of priority
TENANTS = 10_000  # remembered at most, while their requests wait


class FairShare:
    """Use it inside one event loop. Times are in loop time, costs in tokens."""

    def __init__(self, weights: Mapping[str, float]) -> None:
        """`weights` are shares by tenant; every other tenant has 1."""
        self._weights = weights
        self._finish: dict[str, float] = {}  # by tenant: when its requests so far would be done
        self._leases: deque[tuple[float, int]] = deque()  # since the queue was empty last; at most SAMPLES
        self._tokens = 0  # of these leases
        self._serial = count()

    def order(self, since: float, tenant: str, priority: int, tokens: int) -> Order:
        """The place of a request that came at `since`. Lower priorities go first, as in vLLM."""
        begin = max(since, self._finish.get(tenant, since))
        cost = tokens * self._seconds_per_token / self._weights.get(tenant, 1.0)
        if cost:
            self._finish[tenant] = begin + cost
            if len(self._finish) > TENANTS:
                self._finish = {name: end for name, end in self._finish.items() if end > since}
        return begin + priority * PRIORITY_SECONDS, next(self._serial), since

    def leased(self, now: float, tokens: int, *, waiting: int) -> None:
        """Notes that a request got its workers while `waiting` others waited."""
        if waiting:
            self._leases.append((now, tokens))
            self._tokens += tokens
            if len(self._leases) > SAMPLES:
                self._tokens -= self._leases.popleft()[1]
        else:
            self._leases.clear()
            self._tokens = 0
            self._finish.clear()

    @property
    def _seconds_per_token(self) -> float:
        """At the speed of the last leases; 0 while nothing has waited."""
        if len(self._leases) < FEWEST:
            return 0.0
        tokens = self._tokens - self._leases[0][1]
        return (self._leases[-1][0] - self._leases[0][0]) / max(1, tokens)
