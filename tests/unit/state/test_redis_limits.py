"""Limits in a Redis that hangs, dies, comes back, or lost a gateway that had taken places."""

from __future__ import annotations

import asyncio
import logging
import time
from pathlib import Path

import pytest

from preft.core.limits import KeyLimits, Limit
from preft.state import redis_limits
from preft.state.redis_limits import RedisLimits
from support.redis_server import RedisServer, running_redis

TEN = KeyLimits(requests_per_minute=10, concurrent_requests=100)


async def test_a_hung_server_delays_one_request_and_lifts_no_limit(
    redis_server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    counter = RedisLimits(redis_server.url(), "c")
    assert (await counter.take("k", TEN, 1, "first")).refused is None
    redis_server.freeze()
    caplog.set_level(logging.INFO)
    began = time.monotonic()
    taken = [await counter.take("k", TEN, 1, str(number)) for number in range(15)]
    assert time.monotonic() - began < 10 * redis_limits.LIMIT_SECONDS
    assert [one.refused for one in taken] == [None] * 9 + [Limit.REQUESTS] * 6  # what came before counts as well
    warnings = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 1
    redis_server.thaw()
    async with asyncio.timeout(30):
        while "for all gateways together again" not in caplog.text:
            await counter.take("another", TEN, 1, "x")
            await asyncio.sleep(0.1)
    await counter.close()


async def test_a_dead_server_is_replaced_by_counting_alone(redis_server: RedisServer) -> None:
    redis_server.kill()
    counters = [RedisLimits(redis_server.url(), "c") for _ in range(2)]
    for counter in counters:
        taken = [await counter.take("k", TEN, 1, str(number)) for number in range(12)]
        assert [one.refused for one in taken].count(None) == 10
        await counter.settle("k", TEN, 0, "1")
        await counter.renew({"k": ["2"]})
    redis_server.start()
    for counter in counters:
        await counter.close()


async def test_no_password_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    counter = RedisLimits("redis://:hunter2@127.0.0.1:1/0", "c")
    assert (await counter.take("k", TEN, 1, "a")).refused is None
    assert "redis://127.0.0.1:1/0" in caplog.text
    assert "hunter2" not in caplog.text
    await counter.close()


async def test_places_of_a_lost_gateway_come_back(redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_limits, "LEASE_SECONDS", 2.0)
    monkeypatch.setattr(redis_limits, "LIMIT_SECONDS", 10.0)
    lost, alive = RedisLimits(redis_server.url(), "c"), RedisLimits(redis_server.url(), "c")
    two = KeyLimits(concurrent_requests=2)
    assert (await lost.take("k", two, 1, "a")).refused is None
    assert (await alive.take("k", two, 1, "b")).refused is None
    assert (await alive.take("k", two, 1, "c")).refused is Limit.CONCURRENT
    await lost.close()
    async with asyncio.timeout(30):
        while (await alive.take("k", two, 1, "c")).refused is not None:
            await alive.renew({"k": ["b"]})
            await asyncio.sleep(0.1)
    for _ in range(30):  # longer than a lease: the renewed places stay taken
        assert (await alive.take("k", two, 1, "d")).refused is Limit.CONCURRENT
        await alive.renew({"k": ["b", "c"]})
        await asyncio.sleep(0.1)
    await alive.close()


async def test_nothing_stays_in_the_server(redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_limits, "LIMIT_SECONDS", 10.0)
    counter = RedisLimits(redis_server.url(), "c")
    limits = KeyLimits(60_000, 60_000, 5)
    await counter.take("k", limits, 10, "a")
    await counter.settle("k", limits, -5, "a")
    keys = [key.decode() for key in await counter._client.keys("*")]
    assert set(keys) <= {"preft:{c}:limit:k:requests", "preft:{c}:limit:k:tokens"}
    async with asyncio.timeout(10):
        while await counter._client.keys("*"):
            await asyncio.sleep(0.05)
    await counter.close()


async def test_a_user_with_the_documented_rights_is_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(redis_limits, "LIMIT_SECONDS", 10.0)
    rights = ["~preft:*", "-@all", "+@read", "+@write", "+@connection", "+@scripting", "+time"]
    with running_redis(tmp_path / "redis") as server:
        assert server.command("ACL", "SETUSER", "ann", "on", ">word", *rights).startswith("+OK")
        counter = RedisLimits(server.url("ann:word@"), "c")
        limits = KeyLimits(5, 500, 5)
        assert (await counter.take("k", limits, 10, "a")).refused is None
        await counter.renew({"k": ["a"]})
        await counter.settle("k", limits, -5, "a")
        assert caplog.text == ""
        assert server.command("EXISTS", "preft:{c}:limit:k:tokens") == ":1\r\n"
        await counter.close()
