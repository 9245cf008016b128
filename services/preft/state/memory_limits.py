"""The limits' counters of one process: a LimitCounter without a server, by the formula of `core.limits`."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping

from preft.core.limits import KeyLimits, Limit, Standing, refusal, seconds, standing

SWEEP_AT = 10_000  # buckets; from here on, full ones are forgotten


class MemoryLimits:
    """Use it inside one event loop. Leases need no renewal: they end with this process."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` is in seconds, and never goes back."""
        self._clock = clock
        self._full_at: dict[tuple[str, Limit], float] = {}
        self._leases: dict[str, set[str]] = {}

    async def take(self, who: str, limits: KeyLimits, tokens: int, lease: str) -> Standing:
        """See `LimitCounter.take`."""
        now = self._clock()
        ahead = self._ahead(who, Limit.REQUESTS, now), self._ahead(who, Limit.TOKENS, now)
        refused = refusal(limits, tokens, *ahead, running=len(self._leases.get(who, ())))
        if refused is None:
            self._count(who, limits, tokens, lease, now)
            ahead = self._ahead(who, Limit.REQUESTS, now), self._ahead(who, Limit.TOKENS, now)
        return standing(limits, tokens, refused, *ahead)

    async def settle(self, who: str, limits: KeyLimits, tokens: int, lease: str) -> None:
        """See `LimitCounter.settle`."""
        if tokens and limits.tokens_per_minute is not None:
            self._move(who, Limit.TOKENS, seconds(tokens, limits.tokens_per_minute), self._clock())
        leases = self._leases.get(who)
        if leases is not None:
            leases.discard(lease)
            if not leases:
                del self._leases[who]

    async def renew(self, leases: Mapping[str, Collection[str]]) -> None:
        """Does nothing."""

    async def close(self) -> None:
        """Does nothing."""

    def count(self, who: str, limits: KeyLimits, tokens: int, lease: str) -> None:
        """Takes a request, its tokens and its place, even beyond the limits."""
        self._count(who, limits, tokens, lease, self._clock())

    def _count(self, who: str, limits: KeyLimits, tokens: int, lease: str, now: float) -> None:
        if len(self._full_at) > SWEEP_AT:
            self._full_at = {key: full_at for key, full_at in self._full_at.items() if full_at > now}
        self._move(who, Limit.REQUESTS, seconds(1, limits.requests_per_minute), now)
        self._move(who, Limit.TOKENS, seconds(tokens, limits.tokens_per_minute), now)
        if limits.concurrent_requests is not None:
            self._leases.setdefault(who, set()).add(lease)

    def _ahead(self, who: str, limit: Limit, now: float) -> float:
        return max(0.0, self._full_at.get((who, limit), now) - now)

    def _move(self, who: str, limit: Limit, by: float, now: float) -> None:
        if by:
            self._full_at[who, limit] = max(self._full_at.get((who, limit), now), now) + by
