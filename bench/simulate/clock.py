"""An event loop with virtual time, and the measurement of the router's real time.

The loop never sleeps: as soon as no callback is ready, its time jumps to the next timer. So minutes of a cluster take
as long as the callbacks need, and equal seeds give equal runs.
"""

from __future__ import annotations

import asyncio
import selectors
import time
from array import array
from collections.abc import Mapping
from types import TracebackType


class VirtualLoop(asyncio.SelectorEventLoop):
    """Its `time` starts at 0 and passes only while nothing is to do."""

    def __init__(self) -> None:
        self._now = 0.0
        super().__init__(_Jump(self))

    def time(self) -> float:
        return self._now

    def jump(self, seconds: float) -> None:
        self._now += seconds


class _Jump(selectors.SelectSelector):
    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Passes the time until the next timer. Raises RuntimeError if there is none: the run would never end."""
        if timeout is None:
            raise RuntimeError("the simulation waits for nothing")
        if timeout > 0:
            self._loop.jump(timeout)
        return []


class Stopwatch:
    """The processor time of one kind of call, each in seconds: other programs on the machine don't count.

    A `with` block is one call. Calls inside a call of the same watch count as part of the outer one.
    """

    def __init__(self) -> None:
        self.times = array("d")
        self._depth = 0
        self._began = 0

    def __enter__(self) -> None:
        self._depth += 1
        if self._depth == 1:
            self._began = time.thread_time_ns()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._depth -= 1
        if not self._depth:
            self.times.append((time.thread_time_ns() - self._began) / 1e9)

    def forget(self) -> None:
        """Drops the calls so far."""
        del self.times[:]


def quantile(values: array[float] | list[float], share: float) -> float:
    """The smallest value that at least `share` of all values don't exceed; 0 without values."""
    if not values:
        return 0.0
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def rounded(figures: Mapping[str, float]) -> dict[str, float]:
    """Five significant digits of each figure."""
    return {key: float(f"{value:.5g}") for key, value in figures.items()}
