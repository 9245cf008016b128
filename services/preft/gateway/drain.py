"""Shutdown of a gateway: running requests may finish, new requests are refused, late requests end with an error.

Owns the set of running requests. HTTP and gRPC code enters `running` for each request and reports the errors.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from preft.core.errors import ShuttingDown


class Drain:
    """For one asyncio loop. A drain begins once and can't be undone."""

    def __init__(self) -> None:
        self._limits: set[asyncio.Timeout] = set()
        self._begun = False
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def begun(self) -> bool:
        return self._begun

    def begin(self) -> None:
        """Refuses new requests from now on."""
        self._begun = True

    def interrupt(self) -> None:
        """Ends every running request with ShuttingDown, and refuses new requests."""
        self._begun = True
        now = asyncio.get_running_loop().time()
        for limit in self._limits:
            if limit.when() is None:
                limit.reschedule(now)

    async def wait_idle(self) -> None:
        """Returns when no request runs."""
        await self._idle.wait()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Surrounds one request in its task. Raises ShuttingDown at once after `begin`, or later by `interrupt`."""
        if self._begun:
            raise ShuttingDown("the server is shutting down: send the request again later, or to another server")
        limit = asyncio.timeout(None)
        self._limits.add(limit)
        self._idle.clear()
        try:
            async with limit:
                yield
        except TimeoutError:
            if not limit.expired():
                raise
            raise ShuttingDown("the server shut down before the answer was complete: send the request again") from None
        finally:
            self._limits.discard(limit)
            if not self._limits:
                self._idle.set()
