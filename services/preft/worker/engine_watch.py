"""Notices an engine that hangs: its process lives, but makes no step, for example because a device call never returns.

Owns the probes of one engine and the time of its silence. The engine answers a probe between two steps. A silent engine
is killed; from there on, everything is as after the death of its process.
"""

from __future__ import annotations

import asyncio
import logging

from preft.core.errors import WorkerLost
from preft.engine.port import Engine

logger = logging.getLogger(__name__)

TICK_SECONDS = 1.0  # between the answer to one probe and the next probe, at most
TICKS = 20  # in a timeout, at least
STALLED_SECONDS = 5.0  # silence that is longer than usual steps, and ...
STALLED_SHARE = 0.25  # of the timeout, at most


class EngineWatch:
    """The watch on one engine. `run` it once."""

    def __init__(self, engine: Engine, timeout: float) -> None:
        """The engine is killed after `timeout` seconds without an answer."""
        self._engine = engine
        self._timeout = timeout
        self._tick = min(TICK_SECONDS, timeout / TICKS)
        self._stalls_after = min(STALLED_SECONDS, STALLED_SHARE * timeout)
        self._silence = 0.0

    @property
    def stalled_seconds(self) -> int:
        """The time for which the engine hasn't answered, once it is longer than usual steps; else 0."""
        return max(1, int(self._silence)) if self._silence >= self._stalls_after else 0

    async def run(self) -> None:
        """Returns once the engine is dead."""
        while True:
            probe = asyncio.create_task(self._engine.between_steps())
            try:
                while not probe.done():
                    await asyncio.wait({probe}, timeout=self._tick)
                    if not probe.done():
                        self._count_tick()
                    if self._silence >= self._timeout:
                        return self._engine.kill(f"it hung, and was killed after {self._timeout:g} s without a step")
                probe.result()
            except WorkerLost:
                return
            finally:
                probe.cancel()
            self._answered()
            await asyncio.sleep(self._tick)

    def _count_tick(self) -> None:
        """Counts silence in ticks of this process, not by the clock.

        Time for which this process or the whole machine stood still counts as one tick: the engine may have stood still
        as well.
        """
        was_stalled = self.stalled_seconds > 0
        self._silence += self._tick
        if self.stalled_seconds and not was_stalled:
            logger.warning("the engine has made no step for %g s: requests go to other workers, if any", self._silence)

    def _answered(self) -> None:
        if self.stalled_seconds:
            logger.warning("the engine goes on after %d s without a step", self.stalled_seconds)
        self._silence = 0.0
