"""Which workers live: heartbeats that change, calls that break, and clocks that are wrong."""

from __future__ import annotations

import time

import pytest
from preft.router.liveness import Liveness

from preft.core.cluster import Role, Worker, WorkerState

TIMEOUT = 10.0


def w(heartbeat: float, address: str = "h:1") -> Worker:
    return Worker("w", Role.DECODE, WorkerState.READY, address, "f", pid=1, heartbeat=heartbeat)


class Reads:
    """A registry that is read every second."""

    def __init__(self) -> None:
        self.liveness = Liveness(TIMEOUT)
        self.now = time.monotonic()

    def read(self, worker: Worker, seconds: float = 1.0) -> bool:
        self.now += seconds
        self.liveness.read([worker], self.now)
        return self.liveness.alive("w")


@pytest.mark.parametrize("error", [0.0, 5.0, -5.0, 1e6, -1e6])
def test_what_counts_is_that_the_heartbeat_changes(error: float) -> None:
    reads, clock = Reads(), time.time() + error
    reads.read(w(clock))
    for beat in range(1, 40):
        assert reads.read(w(clock + beat))
    for silent in range(1, 11):
        assert reads.read(w(clock + 39)), silent
    assert not reads.read(w(clock + 39))
    assert reads.read(w(clock + 40))


def test_a_record_that_was_old_when_it_was_found_is_dead_until_it_changes() -> None:
    reads, old = Reads(), time.time() - 3600
    assert not reads.read(w(old))
    assert reads.read(w(old + 0.1))


def test_clocks_that_go_backwards_are_fine() -> None:
    reads, clock = Reads(), time.time()
    assert all(reads.read(w(clock - beat)) for beat in range(40))


def test_rare_reads_find_a_worker_alive() -> None:
    reads, clock = Reads(), time.time()
    assert all(reads.read(w(clock + beat), seconds=60) for beat in range(5))


def test_a_lost_worker_is_alive_after_a_heartbeat_that_is_surely_later() -> None:
    reads, clock = Reads(), time.time()
    assert reads.read(w(clock))
    assert reads.liveness.lost("w")
    assert not reads.liveness.lost("w")
    assert not reads.liveness.alive("w")
    reads.liveness.read([w(clock + 1)], reads.now - 1)  # asked before the call broke
    assert not reads.liveness.alive("w")
    assert not reads.read(w(clock + 2))  # may have been written before the call broke
    assert not reads.read(w(clock + 2))
    assert reads.read(w(clock + 3))


def test_a_lost_worker_that_started_again_is_alive() -> None:
    reads, clock = Reads(), time.time()
    assert reads.read(w(clock))
    reads.liveness.lost("w")
    assert reads.read(w(clock + 1, "h:2"))


def test_an_unknown_worker_can_not_be_lost() -> None:
    assert not Reads().liveness.lost("w")
