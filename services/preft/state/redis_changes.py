"""Tells of changes in Redis at once: a subscription in a task of its own, renewed whenever it breaks.

A message that is lost with a connection is made up for: each new subscription counts as a change.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress

from redis.asyncio import Redis
from redis.exceptions import RedisError

from preft.core.background import cancelled

logger = logging.getLogger(__name__)

PING_SECONDS = 5.0  # without any message for this long, the connection is asked; without an answer it is given up
RETRY_SECONDS = 0.5


class RedisChanges:
    """Counts the changes that `channel` tells of. `close` ends the task."""

    def __init__(self, client: Redis, channel: str, limit_seconds: float) -> None:
        """`limit_seconds` bounds the time to subscribe."""
        self._client = client
        self._channel = channel
        self._limit = limit_seconds
        self._count, self._seen = 0, 0
        self._counted = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._closed = False

    async def wait(self, timeout: float) -> None:
        """Returns at a change since the last call returned, after `timeout` seconds at the latest."""
        if self._task is None and not self._closed:
            self._task = asyncio.create_task(self._follow(), name="changes in Redis")
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                while self._count == self._seen:
                    self._counted.clear()
                    await self._counted.wait()
        self._seen = self._count

    async def close(self) -> None:
        self._closed = True
        if self._task is not None:
            await cancelled([self._task])

    async def _follow(self) -> None:
        failing = False  # logged once
        while True:
            try:
                await self._listen()
            except (RedisError, OSError, TimeoutError) as error:
                if not failing:
                    logger.info("changes in the state store are found by polling alone: %s", type(error).__name__)
                failing = True
            except Exception:
                logger.exception("changes in the state store are found by polling alone: an unexpected error")
            await asyncio.sleep(RETRY_SECONDS)

    async def _listen(self) -> None:
        """Listens until the connection breaks. Raises what redis-py raises."""
        async with self._client.pubsub() as subscription:
            async with asyncio.timeout(self._limit):
                await subscription.subscribe(self._channel)
            asked = False
            while True:
                message = await subscription.get_message(timeout=PING_SECONDS)
                if message is None and asked:
                    raise TimeoutError
                asked = message is None
                if message is None:
                    async with asyncio.timeout(self._limit):
                        await subscription.ping()
                elif message["type"] in ("subscribe", "message"):
                    self._count += 1
                    self._counted.set()
