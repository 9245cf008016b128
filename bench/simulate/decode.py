"""One simulated decode worker: all its sequences advance together, one token per step.

Steps aren't simulated one by one. Between two changes of the batch, steps take equal time, so that the time of the next
end is known.
"""

from __future__ import annotations

import heapq
import math
from asyncio import AbstractEventLoop, TimerHandle
from collections import deque
from collections.abc import Callable
from itertools import count

from bench.simulate.attempt import SimAttempt
from bench.simulate.scenario import Engine
from preft.core.cluster import StatusUpdate, WorkerStatus

Event = tuple[float, int, SimAttempt]


class DecodeWorker:
    """At most `decode_batch` sequences run at once, the others wait in order."""

    def __init__(self, engine: Engine, loop: AbstractEventLoop, on_end: Callable[[SimAttempt], None]) -> None:
        """`on_end` gets each attempt whose last token has been computed."""
        self.staging_used = 0
        self.blocks_used = 0
        self._engine = engine
        self._loop = loop
        self._on_end = on_end
        self._attempts: dict[SimAttempt, int] = {}  # its blocks
        self._running: set[SimAttempt] = set()
        self._waiting: deque[SimAttempt] = deque()
        self._steps = 0.0  # since the start
        self._at = 0.0  # when `_steps` was right
        self._serial = count()
        self._ends: list[Event] = []  # heap, by step
        self._full: list[Event] = []  # heap, by step: when an attempt's blocks are full
        self._timer: TimerHandle | None = None
        self._gone = False

    def submit(self, attempt: SimAttempt) -> None:
        """Takes a sequence whose prompt's KV has come."""
        blocks = -(-(attempt.request.arrival.prompt + 1) // self._engine.block_size)
        self._attempts[attempt] = blocks
        self.blocks_used += blocks
        self.staging_used += attempt.staged
        self._waiting.append(attempt)
        self._pass()
        self._plan()

    def status(self, router: str, *, whole: bool = False) -> StatusUpdate:
        """What to tell this router."""
        fit = self._engine.staging_bytes - self.staging_used
        status = WorkerStatus(
            running=len(self._attempts),
            kv_blocks_used=self.blocks_used,
            staging_bytes_used=self.staging_used,
            staging_bytes_fit=max(0, fit),
            other_sequences=sum(one.request.router.name != router for one in self._attempts),
        )
        return StatusUpdate(status, {}, whole)

    def close(self) -> list[SimAttempt]:
        """The worker is gone. Returns the attempts that it had, with their tokens so far."""
        self._pass()
        self._gone = True
        for step, _, attempt in self._ends:
            attempt.request.tokens = max(1, attempt.request.arrival.output - math.ceil(step - self._steps))
        return list(self._attempts)

    def _step_seconds(self) -> float:
        return self._engine.decode_seconds + len(self._running) * self._engine.decode_sequence_seconds

    def _pass(self) -> None:
        """Advances to now, and handles what happened at the last step."""
        now = self._loop.time()
        if self._running:
            self._steps += (now - self._at) / self._step_seconds()
        self._at = now
        reached = self._steps + 1e-6
        while self._full and self._full[0][0] <= reached:
            step, _, attempt = heapq.heappop(self._full)
            if attempt.open and attempt in self._running:
                attempt.lease.grow(0)
                self._attempts[attempt] += 1
                self.blocks_used += 1
                heapq.heappush(self._full, (step + self._engine.block_size, next(self._serial), attempt))
        while self._ends and self._ends[0][0] <= reached:
            attempt = heapq.heappop(self._ends)[2]
            self._running.discard(attempt)
            self.blocks_used -= self._attempts.pop(attempt)
            attempt.request.tokens = attempt.request.arrival.output
            self._on_end(attempt)
        while self._waiting and len(self._running) < self._engine.decode_batch:
            self._start(self._waiting.popleft())

    def _start(self, attempt: SimAttempt) -> None:
        request = attempt.request
        self._running.add(attempt)
        self.staging_used -= attempt.staged
        attempt.lease.kv_loaded(0)
        todo = request.arrival.output - request.tokens
        room = attempt.lease.room(0) - request.arrival.prompt - request.tokens
        heapq.heappush(self._ends, (self._steps + todo, next(self._serial), attempt))
        if room < todo:
            heapq.heappush(self._full, (self._steps + max(1, room), next(self._serial), attempt))

    def _plan(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        nexts = [heap[0][0] for heap in (self._ends, self._full) if heap]
        if nexts and not self._gone:
            seconds = max(0.0, min(nexts) - self._steps) * self._step_seconds()
            self._timer = self._loop.call_later(seconds, self._wake)

    def _wake(self) -> None:
        if not self._gone:
            self._timer = None
            self._pass()
            self._plan()
