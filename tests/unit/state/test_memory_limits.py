"""The formula of rates, against a clock that the test sets."""

from __future__ import annotations

import random

import pytest

from preft.core.limits import PERIOD, KeyLimits, Limit, rate_headers
from preft.state import memory_limits
from preft.state.memory_limits import MemoryLimits


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


async def test_a_whole_minute_may_come_at_once_and_then_one_after_the_other(clock: Clock) -> None:
    counter, limits = MemoryLimits(clock), KeyLimits(requests_per_minute=6)
    left = [(await counter.take("k", limits, 1, str(number))).requests_left for number in range(6)]
    assert left == [5, 4, 3, 2, 1, 0]
    refused = await counter.take("k", limits, 1, "x")
    assert (refused.refused, refused.retry_after, refused.requests_reset) == (Limit.REQUESTS, 10, PERIOD)
    clock.now += 9.99
    assert (await counter.take("k", limits, 1, "x")).refused is Limit.REQUESTS
    clock.now += 0.02
    assert (await counter.take("k", limits, 1, "x")).refused is None
    assert (await counter.take("k", limits, 1, "x")).refused is Limit.REQUESTS
    clock.now += PERIOD
    assert (await counter.take("k", limits, 1, "x")).requests_left == 5


async def test_no_rate_is_above_the_limit_in_the_long_run(clock: Clock) -> None:
    counter, limits, chance = MemoryLimits(clock), KeyLimits(tokens_per_minute=1000), random.Random(3)
    taken, began = 0, clock.now
    for _ in range(3000):
        clock.now += chance.random()
        tokens = chance.randrange(1, 60)
        if (await counter.take("k", limits, tokens, "x")).refused is None:
            taken += tokens
    minutes = (clock.now - began) / PERIOD
    assert 0.95 * 1000 * minutes < taken <= 1000 * (minutes + 1)


async def test_tokens_come_back_when_they_were_not_used(clock: Clock) -> None:
    counter, limits = MemoryLimits(clock), KeyLimits(tokens_per_minute=100)
    assert (await counter.take("k", limits, 100, "a")).tokens_left == 0
    assert (await counter.take("k", limits, 1, "b")).refused is Limit.TOKENS
    await counter.settle("k", limits, -70, "a")
    assert (await counter.take("k", limits, 60, "b")).tokens_left == 10


async def test_a_debt_is_paid_before_the_next_request(clock: Clock) -> None:
    counter, limits = MemoryLimits(clock), KeyLimits(tokens_per_minute=60)
    await counter.take("k", limits, 10, "a")
    await counter.settle("k", limits, 110, "a")
    refused = await counter.take("k", limits, 1, "b")
    assert (refused.refused, refused.retry_after, refused.tokens_left) == (Limit.TOKENS, 61, 0)
    clock.now += 61
    assert (await counter.take("k", limits, 1, "b")).refused is None


async def test_what_never_fits_has_no_time(clock: Clock) -> None:
    refused = await MemoryLimits(clock).take("k", KeyLimits(tokens_per_minute=5), 6, "a")
    assert (refused.refused, refused.retry_after, refused.tokens_left) == (Limit.TOKENS, None, 5)


async def test_a_limit_that_ends_refuses_nothing(clock: Clock) -> None:
    counter = MemoryLimits(clock)
    await counter.take("k", KeyLimits(requests_per_minute=1, tokens_per_minute=1), 1, "a")
    assert (await counter.take("k", KeyLimits(concurrent_requests=3), 50, "b")).refused is None


async def test_buckets_that_are_full_are_forgotten(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_limits, "SWEEP_AT", 10)
    counter, limits = MemoryLimits(clock), KeyLimits(requests_per_minute=60)
    for number in range(100):
        clock.now += 2
        await counter.take(str(number), limits, 1, "a")
    assert len(counter._full_at) <= 12


async def test_headers_are_of_the_limits_that_exist(clock: Clock) -> None:
    counter = MemoryLimits(clock)
    both = await counter.take("k", KeyLimits(60, 600), 150, "a")
    assert dict(rate_headers(both)) == {
        "x-ratelimit-limit-requests": "60",
        "x-ratelimit-remaining-requests": "59",
        "x-ratelimit-reset-requests": "1.000s",
        "x-ratelimit-limit-tokens": "600",
        "x-ratelimit-remaining-tokens": "450",
        "x-ratelimit-reset-tokens": "15.000s",
    }
    assert rate_headers(await counter.take("q", KeyLimits(concurrent_requests=2), 150, "a")) == []
