"""The threads that read sources. Each place has a limited share, so that one place's slow sources block no other place.

A place is a remote source's scheme and host (`AdapterSource.place`). The module owns the threads and their
distribution, not the work that runs in them.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

PER_PLACE = 8  # threads at a time
REMOTE = 64  # threads of all remote places together


class FetchThreads:
    """For one asyncio loop. Local sources, which wait for no network, have separate threads."""

    def __init__(self, name: str, initializer: Callable[[], None] | None = None) -> None:
        """`initializer` runs at the start of each thread."""
        self._local = ThreadPoolExecutor(PER_PLACE, f"{name}-local", initializer)
        self._remote = ThreadPoolExecutor(REMOTE, name, initializer)
        self._places: dict[str, tuple[asyncio.Semaphore, int]] = {}  # the semaphore, and its holders and waiters

    async def run(self, place: str, work: Callable[[], T], stop: threading.Event | None = None) -> T:
        """Runs `work` in a thread, once `place` ("" for local sources) may have one, and returns its result.

        Cancelling with `stop` sets `stop`, which must soon end the work, and waits for the end. Cancelling without
        `stop` leaves the thread running.
        """
        turns, waiting = self._places.get(place, (asyncio.Semaphore(PER_PLACE), 0))
        self._places[place] = turns, waiting + 1
        try:
            async with turns:
                job = (self._remote if place else self._local).submit(work)
                try:
                    return await asyncio.wrap_future(job)
                except asyncio.CancelledError:
                    if stop is not None:
                        stop.set()
                        if not job.cancel():
                            await asyncio.gather(asyncio.wrap_future(job), return_exceptions=True)
                    raise
        finally:
            turns, waiting = self._places.pop(place)
            if waiting > 1:
                self._places[place] = turns, waiting - 1

    def close(self) -> None:
        """Takes no more work. Running threads end by themselves."""
        for threads in (self._local, self._remote):
            threads.shutdown(wait=False, cancel_futures=True)
