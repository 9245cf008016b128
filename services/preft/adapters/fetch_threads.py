"""The threads in which sources are read, shared so that no place's slow sources keep the others waiting.

A place is what slow sources have in common (`AdapterSource.place`). Owns the threads and who may have one; what runs in
them is the caller's.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

PER_PLACE = 8  # threads at a time
REMOTE = 64  # threads of all remote places


class FetchThreads:
    """For one asyncio loop. Local sources have threads of their own, as they wait for no network."""

    def __init__(self, name: str, initializer: Callable[[], None] | None = None) -> None:
        """`initializer` runs at the start of each thread."""
        self._local = ThreadPoolExecutor(PER_PLACE, f"{name}-local", initializer)
        self._remote = ThreadPoolExecutor(REMOTE, name, initializer)
        self._places: dict[str, tuple[asyncio.Semaphore, int]] = {}  # the turns, and how many have or want one

    async def run(self, place: str, work: Callable[[], T], stop: threading.Event | None = None) -> T:
        """What `work` returns, in a thread, once `place` ("" for local sources) may have one.

        With `stop`, which must soon end the work, a cancellation sets it and waits for the end. Without, the thread is
        left to itself.
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
        """Takes no more. Threads that work end by themselves."""
        for threads in (self._local, self._remote):
            threads.shutdown(wait=False, cancel_futures=True)
