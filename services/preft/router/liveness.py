"""Decides which registered workers are alive, from their heartbeats and from calls that broke.

The module owns the time when each heartbeat was first seen, by this process's clock: other machines' clocks may be
wrong. The module reads no registry and makes no calls.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

from preft.core.cluster import Worker


@dataclass(slots=True)
class _Pulse:
    """The record of one worker. Times are in `time.monotonic()` seconds.

    `lost_at` is when a call broke, or None. `beat_after` is the heartbeat of the first read after that break: this
    heartbeat may be older than the break, but a later one is not.
    """

    process: tuple[str, int]
    heartbeat: float
    changed_at: float
    lost_at: float | None = None
    beat_after: float | None = None


class Liveness:
    """`read` takes each list of workers, and `lost` each broken call."""

    def __init__(self, timeout: float) -> None:
        """A worker whose heartbeat doesn't change for `timeout` seconds is dead."""
        self._timeout = timeout
        self._pulses: dict[str, _Pulse] = {}
        self._read_at = 0.0

    def read(self, workers: Iterable[Worker], asked: float) -> None:
        """Takes the registry's list of all workers. `asked` is when the query began (`time.monotonic()`)."""
        self._read_at = asked
        known, self._pulses = self._pulses, {}
        for worker in workers:
            process = worker.address, worker.pid
            pulse = known.get(worker.id)
            if pulse is None or pulse.process != process:
                # Only here another clock counts: a wrong one keeps a new worker out until its next heartbeat.
                age = time.time() - worker.heartbeat if pulse is None else 0.0
                since = asked - age if age > self._timeout else asked
                pulse = _Pulse(process, worker.heartbeat, since)
            if pulse.heartbeat != worker.heartbeat:
                pulse.heartbeat, pulse.changed_at = worker.heartbeat, asked
            if pulse.lost_at is not None and asked > pulse.lost_at:
                if pulse.beat_after is None:
                    pulse.beat_after = worker.heartbeat
                elif pulse.beat_after != worker.heartbeat:
                    pulse.lost_at = pulse.beat_after = None
            self._pulses[worker.id] = pulse

    def lost(self, worker_id: str) -> bool:
        """Marks the worker dead until a later heartbeat, as a call broke. Returns False if it was marked already."""
        pulse = self._pulses.get(worker_id)
        if pulse is None:
            return False
        news = pulse.lost_at is None
        pulse.lost_at, pulse.beat_after = time.monotonic(), None
        return news

    def alive(self, worker_id: str) -> bool:
        """Whether the worker is alive. While the registry can't be read, no heartbeat expires."""
        pulse = self._pulses[worker_id]
        return pulse.lost_at is None and self._read_at - pulse.changed_at <= self._timeout
