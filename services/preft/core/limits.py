"""The limits of an API key, the port of their counters, and the one rule for rates.

The rule is the generic cell rate algorithm in its form of virtual scheduling (ITU-T recommendation I.371, annex A): a
token bucket whose whole state is one time. A limit of L units per minute holds 60 seconds of work: a unit takes 60 / L
seconds. `full_at` is the time at which the bucket would be full again, if nothing more came. At time t, a request of c
units moves it to

    full_at' = max(full_at, t) + c * 60 / L        and passes if full_at' - t <= 60.

So L units may come at once after a quiet minute, and never more than 2 L in any minute. A refused request would pass
after full_at' - 60 - t seconds. Units that were reserved and not used move `full_at` back, and units that were used and
not reserved move it on: then it may lie more than a minute ahead, and requests wait until the debt is paid.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

PERIOD = 60.0  # seconds: limits are per minute
CONCURRENT_WAIT = 1.0  # seconds until another try: nobody knows when a running request ends
LEASE_SECONDS = 30.0  # a running request counts for so long after its gateway was heard of last
RENEWAL_SECONDS = 10.0


class Limit(StrEnum):
    """The limits of a key, by their names in the key file."""

    REQUESTS = "requests_per_minute"
    TOKENS = "tokens_per_minute"
    CONCURRENT = "concurrent_requests"


@dataclass(frozen=True, slots=True)
class KeyLimits:
    """None: no limit. Tokens are those of the prompt and the generated ones."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent_requests: int | None = None

    def __bool__(self) -> bool:
        return (self.requests_per_minute, self.tokens_per_minute, self.concurrent_requests) != (None, None, None)


@dataclass(frozen=True, slots=True)
class Standing:
    """What a key's limits leave after a request. Times are in seconds.

    `refused` names the limit that refuses the request, if any: then nothing was taken, and `retry_after` is the time
    after which the request may pass (None: never, because it needs more tokens than a minute has). The `reset` times
    say when a limit would be whole again.
    """

    limits: KeyLimits
    refused: Limit | None = None
    retry_after: float | None = None
    requests_left: int = 0
    requests_reset: float = 0.0
    tokens_left: int = 0
    tokens_reset: float = 0.0


class LimitCounter(Protocol):
    """Counts the use of limits by `who`, a key's name. Never raises: a counter that is away is replaced by another."""

    async def take(self, who: str, limits: KeyLimits, tokens: int, lease: str) -> Standing:
        """Takes one request, `tokens` tokens, and one place among the running requests, which `lease` names.

        All of them or, if one limit refuses, none.
        """

    async def settle(self, who: str, limits: KeyLimits, tokens: int, lease: str) -> None:
        """Ends the request of `lease`. `tokens`: those that were used and not taken; negative: the reverse."""

    async def renew(self, leases: Mapping[str, Collection[str]]) -> None:
        """Keeps the leases of running requests, by `who`. Call it every RENEWAL_SECONDS."""

    async def close(self) -> None:
        """Ends all use of the counter."""


def seconds(units: float, limit: int | None) -> float:
    """The time by which `units` move a bucket of `limit` units per minute; 0 without a limit."""
    return units * PERIOD / limit if limit is not None else 0.0


def refusal(limits: KeyLimits, tokens: int, requests_ahead: float, tokens_ahead: float, running: int) -> Limit | None:
    """The limit that refuses one more request with `tokens` tokens.

    The `ahead` values are full_at - t, in seconds, or 0 if the bucket is full; `running` counts the running requests.
    """
    per_request, per_tokens = seconds(1, limits.requests_per_minute), seconds(tokens, limits.tokens_per_minute)
    if per_request and requests_ahead + per_request > PERIOD:
        return Limit.REQUESTS
    if per_tokens and tokens_ahead + per_tokens > PERIOD:
        return Limit.TOKENS
    if limits.concurrent_requests is not None and running >= limits.concurrent_requests:
        return Limit.CONCURRENT
    return None


def standing(
    limits: KeyLimits, tokens: int, refused: Limit | None, requests_ahead: float, tokens_ahead: float
) -> Standing:
    """What is left. The `ahead` values include the request, unless it was refused."""
    wait: float | None = None
    if refused is Limit.REQUESTS:
        wait = requests_ahead + seconds(1, limits.requests_per_minute) - PERIOD
    elif refused is Limit.TOKENS and tokens <= (limits.tokens_per_minute or 0):
        wait = tokens_ahead + seconds(tokens, limits.tokens_per_minute) - PERIOD
    elif refused is Limit.CONCURRENT:
        wait = CONCURRENT_WAIT
    requests_left = _left(requests_ahead, limits.requests_per_minute)
    return Standing(
        limits,
        refused,
        wait,
        requests_left,
        requests_ahead,
        _left(tokens_ahead, limits.tokens_per_minute),
        tokens_ahead,
    )


def _left(ahead: float, limit: int | None) -> int:
    return max(0, int((PERIOD - ahead) * (limit or 0) / PERIOD + 1e-6))


def rate_headers(left: Standing) -> list[tuple[str, str]]:
    """OpenAI's headers for the limits per minute that exist."""
    headers = []
    for kind, limit, remaining, reset in (
        ("requests", left.limits.requests_per_minute, left.requests_left, left.requests_reset),
        ("tokens", left.limits.tokens_per_minute, left.tokens_left, left.tokens_reset),
    ):
        if limit is not None:
            headers += [
                (f"x-ratelimit-limit-{kind}", str(limit)),
                (f"x-ratelimit-remaining-{kind}", str(remaining)),
                (f"x-ratelimit-reset-{kind}", f"{reset:.3f}s"),
            ]
    return headers
