"""The limits' counters in Redis, one for all gateways of a cluster, by the formula of `core.limits`.

    limit:NAME:requests, limit:NAME:tokens    a bucket's `full_at` in ms of the server's clock; expires once it is full
    limit:NAME:running                        sorted set: lease -> time of its end, which gateways move on

Requests never wait long for the server and never fail by it. A server that doesn't answer is left alone for a while,
and each gateway then counts by itself, with the whole limits: n gateways together allow at most n times as much. Each
gateway counts all its requests itself as well, so that no bucket is full anew when the server goes away. When the
server is back, it doesn't know the requests of the meantime: that is at most a minute of them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Collection, Mapping
from typing import Any

from redis.exceptions import RedisError

from preft.core.limits import LEASE_SECONDS, PERIOD, KeyLimits, Limit, Standing, seconds, standing
from preft.state.memory_limits import MemoryLimits
from preft.state.redis_url import parse_redis_url, redis_client

Arguments = list[str | int | float]

logger = logging.getLogger(__name__)

LIMIT_SECONDS = 0.5  # for one step, the connection's start included
AWAY_SECONDS = 2.0  # between two tries of a server that doesn't answer
CONNECTIONS = 32
LIMITS = (None, Limit.REQUESTS, Limit.TOKENS, Limit.CONCURRENT)  # by the number that TAKE returns

# KEYS: requests, tokens, running. ARGV: the time in ms that one request needs, and the request's tokens; the most
# running requests (-1: no limit); lease; its length in ms; the period in ms. As `core.limits.refusal`.
# Returns the refusing limit's number (0: none), and the two buckets' full_at - now in ms.
TAKE = """
local time = redis.call('TIME')
local now, period = time[1] * 1000 + time[2] / 1000, tonumber(ARGV[6])
local costs, ahead, refused = {tonumber(ARGV[1]), tonumber(ARGV[2])}, {}, 0
for i = 1, 2 do ahead[i] = math.max(0, tonumber(redis.call('GET', KEYS[i]) or '0') - now) end
local most = tonumber(ARGV[3])
if ahead[1] + costs[1] > period and costs[1] > 0 then refused = 1
elseif ahead[2] + costs[2] > period and costs[2] > 0 then refused = 2
elseif most >= 0 then
  redis.call('ZREMRANGEBYSCORE', KEYS[3], '-inf', now)
  if redis.call('ZCARD', KEYS[3]) >= most then refused = 3 end
end
if refused == 0 then
  for i = 1, 2 do
    if costs[i] > 0 then
      ahead[i] = ahead[i] + costs[i]
      redis.call('SET', KEYS[i], string.format('%.3f', now + ahead[i]), 'PX', math.ceil(ahead[i]) + 1)
    end
  end
  if most >= 0 then
    redis.call('ZADD', KEYS[3], now + ARGV[5], ARGV[4])
    redis.call('PEXPIRE', KEYS[3], ARGV[5])
  end
end
return {refused, string.format('%.3f', ahead[1]), string.format('%.3f', ahead[2])}
"""

# KEYS: tokens, running. ARGV: the ms by which the bucket moves, lease.
SETTLE = """
redis.call('ZREM', KEYS[2], ARGV[2])
local by = tonumber(ARGV[1])
if by ~= 0 then
  local time = redis.call('TIME')
  local now = time[1] * 1000 + time[2] / 1000
  local ahead = math.max(0, tonumber(redis.call('GET', KEYS[1]) or '0') - now) + by
  if ahead > 0 then
    redis.call('SET', KEYS[1], string.format('%.3f', now + ahead), 'PX', math.ceil(ahead) + 1)
  else
    redis.call('DEL', KEYS[1])
  end
end
"""

# KEYS: running, for each name. ARGV: the leases' length in ms, then for each key the number of its leases and these.
RENEW = """
local time = redis.call('TIME')
local ends, at = time[1] * 1000 + time[2] / 1000 + ARGV[1], 2
for i, key in ipairs(KEYS) do
  for j = at + 1, at + ARGV[at] do redis.call('ZADD', key, 'XX', ends, ARGV[j]) end
  redis.call('PEXPIRE', key, ARGV[1])
  at = at + ARGV[at] + 1
end
"""


class RedisLimits:
    """A LimitCounter. Use it inside one event loop. Connects at the first call."""

    def __init__(self, url: str, cluster: str) -> None:
        """Raises ConfigError if `url` is malformed."""
        self._url = parse_redis_url(url)
        self._client, self._sentinels = redis_client(self._url, LIMIT_SECONDS, LIMIT_SECONDS)
        self._prefix = f"preft:{{{cluster}}}:limit:"
        self._take = self._client.register_script(TAKE)
        self._settle = self._client.register_script(SETTLE)
        self._renew = self._client.register_script(RENEW)
        self._own = MemoryLimits()
        self._connections = asyncio.Semaphore(CONNECTIONS)
        self._away_until: float | None = None  # in loop time

    async def take(self, who: str, limits: KeyLimits, tokens: int, lease: str) -> Standing:
        """See `LimitCounter.take`."""
        costs = [1000 * seconds(1, limits.requests_per_minute), 1000 * seconds(tokens, limits.tokens_per_minute)]
        most = -1 if limits.concurrent_requests is None else limits.concurrent_requests
        arguments: Arguments = [*costs, most, lease, round(1000 * LEASE_SECONDS), 1000 * PERIOD]
        answer = await self._ask(self._take(self._keys(who, "requests", "tokens", "running"), arguments))
        if answer is None:
            return await self._own.take(who, limits, tokens, lease)
        refused = LIMITS[answer[0]]
        if refused is None:
            self._own.count(who, limits, tokens, lease)
        return standing(limits, tokens, refused, float(answer[1]) / 1000, float(answer[2]) / 1000)

    async def settle(self, who: str, limits: KeyLimits, tokens: int, lease: str) -> None:
        """See `LimitCounter.settle`. A server that is away forgets the lease by itself."""
        await self._own.settle(who, limits, tokens, lease)
        by = 1000 * seconds(tokens, limits.tokens_per_minute)
        if by or limits.concurrent_requests is not None:
            await self._ask(self._settle(self._keys(who, "tokens", "running"), [by, lease]))

    async def renew(self, leases: Mapping[str, Collection[str]]) -> None:
        """See `LimitCounter.renew`."""
        if leases:
            keys = [key for who in leases for key in self._keys(who, "running")]
            arguments: Arguments = [round(1000 * LEASE_SECONDS)]
            for own in leases.values():
                arguments += [len(own), *own]
            await self._ask(self._renew(keys, arguments))

    async def close(self) -> None:
        """Closes all connections."""
        for client in (self._client, *self._sentinels):
            try:
                await client.aclose()
            except (RedisError, OSError) as error:  # the connection was broken already
                logger.info("a connection to the limits' counters closed with %s", type(error).__name__)

    def _keys(self, who: str, *kinds: str) -> list[str]:
        return [f"{self._prefix}{who}:{kind}" for kind in kinds]

    async def _ask(self, command: Awaitable[Any]) -> Any:
        """The reply; None if the server is away. One call at a time tries a server that was away."""
        now = asyncio.get_running_loop().time()
        try:
            if self._away_until is not None:
                if now < self._away_until:
                    return None
                self._away_until = now + AWAY_SECONDS
            async with asyncio.timeout(LIMIT_SECONDS), self._connections:
                reply = await command
        except (RedisError, OSError, TimeoutError) as error:
            if self._away_until is None:
                logger.warning(
                    "the limits of API keys are counted by each gateway alone: %s: %s",
                    self._url.shown,
                    self._url.without_secrets(str(error) or type(error).__name__),
                )
            self._away_until = now + LIMIT_SECONDS + AWAY_SECONDS
            return None
        finally:
            if hasattr(command, "close"):
                command.close()  # no effect after its end
        if self._away_until is not None:
            logger.info("the limits of API keys are counted for all gateways together again")
            self._away_until = None
        return [] if reply is None else reply
