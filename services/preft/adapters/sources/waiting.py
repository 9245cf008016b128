"""Waiting for a source: a thread waits for an event loop that reads, for a limited time, at a least pace.

The wait ends soon after nobody wants the bytes any more.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import wait
from typing import Any, TypeVar

from preft.adapters.formats.digest import CHUNK
from preft.adapters.sources.limits import SourceLimits
from preft.core.errors import Unavailable

T = TypeVar("T")

LOOK_SECONDS = 0.1  # a stopped wait ends within this time


class TooSlow(Exception):
    """A source sends less than `SourceLimits.min_rate` bytes per second."""


class Pace:
    """Measures the time spent waiting for one file's bytes, without the time that the reader uses itself."""

    def __init__(self, limits: SourceLimits) -> None:
        self._limits = limits
        self._waited = 0.0
        self._bytes = 0

    @property
    def left(self) -> float:
        """Seconds within which the next CHUNK bytes must come."""
        return self._limits.timeout + (self._bytes + CHUNK) / self._limits.min_rate - self._waited

    def timed(self, read: Callable[[], bytes]) -> bytes:
        """Returns the result of `read`. Raises TooSlow if all reads together took too long."""
        started = time.monotonic()
        chunk = read()
        self._waited += time.monotonic() - started
        self._bytes += len(chunk)
        if self._waited > self._limits.timeout + self._bytes / self._limits.min_rate:
            raise TooSlow
        return chunk


def wait_for(
    work: Coroutine[Any, Any, T],
    loop: asyncio.AbstractEventLoop,
    stop: threading.Event,
    uri: str,
    timeout: float | None = None,
    late: type[Exception] = TimeoutError,
) -> T:
    """Runs `work` in `loop`, which another thread owns. Raises `late` after `timeout` s, and Unavailable once stopped.

    `work` is then cancelled.
    """
    running = asyncio.run_coroutine_threadsafe(work, loop)
    limit = math.inf if timeout is None else time.monotonic() + timeout
    while not wait([running], LOOK_SECONDS).done:
        if stop.is_set() or time.monotonic() > limit:
            running.cancel()
            raise stop_error(uri) if stop.is_set() else late
    return running.result()


def stop_error(uri: str) -> Unavailable:
    """The error for a source whose read was stopped."""
    return Unavailable(f"{uri} is not read any further: nobody waits for it")
