"""Numbers of workers that follow the load. Workers and router are invented; tests/integration has real ones."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preft.cluster import autoscale
from preft.cluster.autoscale import Autoscaler, Scale
from preft.core.cluster import Role
from preft.core.settings import ScalingSettings
from support.worker_servers import settings_for

OFTEN = ScalingSettings(target=0.8, up_seconds=10.0, down_seconds=100.0)


def test_workers_are_added_once_the_pressure_has_lasted() -> None:
    scale = Scale(OFTEN, 1, 8)
    assert [scale.change(1.6, 2, 2, now) for now in (0.0, 5.0, 9.0)] == [0, 0, 0]
    assert scale.change(0.8, 2, 2, 9.5) == 0  # it was a moment's pressure
    assert [scale.change(1.6, 2, 2, now) for now in (10.0, 19.0, 20.0, 21.0)] == [0, 0, 2, 0]


def test_none_is_added_while_another_one_starts() -> None:
    scale = Scale(OFTEN, 1, 8)
    assert [scale.change(1.6, 3, 2, now) for now in (0.0, 50.0)] == [0, 0]
    assert scale.change(1.6, 3, 3, 51.0) == 3


def test_workers_end_one_by_one_and_also_those_that_never_start() -> None:
    scale = Scale(OFTEN, 1, 8)
    assert [scale.change(0.0, 4, 4, now) for now in (0.0, 99.0, 100.0, 101.0)] == [0, 0, -1, 0]
    assert [scale.change(0.0, 3, 2, now) for now in (201.0,)] == [-1]


@given(st.floats(0, 50), st.integers(1, 20), st.integers(1, 5), st.integers(0, 20))
def test_the_number_stays_within_its_bounds(pressure: float, members: int, least: int, more: int) -> None:
    scale = Scale(OFTEN, least, least + more)
    members = max(least, min(members, least + more))
    for now in (0.0, 1000.0):
        change = scale.change(pressure, members, members, now)
    assert least <= members + change <= least + more
    if pressure <= OFTEN.target:
        assert change <= 0
    if abs(pressure / OFTEN.target - 1) <= 0.1:
        assert change == 0


class Invented:
    """Two workers, `c-decode-0` and `c-prefill-0`, and those that are added. Those in `ready` are ready."""

    def __init__(self) -> None:
        self.all = ["c-decode-0", "c-prefill-0"]
        self.ready = set(self.all)
        self.left: dict[str, float] = {}
        self.old: set[str] = set()
        self.ended: list[str] = []
        self.told: list[str] = []
        view = SimpleNamespace(ready=lambda role: [SimpleNamespace(id=one) for one in self._of(role) & self.ready])
        self.router = cast(Any, SimpleNamespace(view=view))

    def _of(self, *roles: Role) -> set[str]:
        return {one for one in self.all if one.split("-")[1] in roles}

    def members(self, *roles: Role) -> list[str]:
        return sorted(self._of(*roles) - set(self.ended))

    def outdated(self, role: Role) -> list[str]:
        return sorted(self._of(role) & self.old - set(self.ended))

    async def room(self, role: Role) -> int:
        return len(self._of(role) - self.left.keys())

    async def leaving(self) -> dict[str, float]:
        return {one: left for one, left in self.left.items() if one not in self.ended}

    async def add(self, role: Role) -> str:
        self.all.append(f"c-{role}-{len(self._of(role))}")
        return self.all[-1]

    async def remove(self, worker_id: str) -> None:
        self.ended.append(worker_id)


async def looks(workers: Invented, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **more: Any) -> Autoscaler:
    monkeypatch.setattr(autoscale, "LOOK_SECONDS", 0.001)
    settings = settings_for(tmp_path, ray_address="h:1", shutdown_timeout=20, **more)
    scaler = Autoscaler(settings, workers.router, workers, workers.told.append)
    scaler.start()
    await asyncio.sleep(0.05)
    return scaler


async def test_a_drained_nodes_worker_ends_once_another_is_ready(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workers = Invented()
    workers.left = {"c-decode-0": math.inf}
    scaler = await looks(workers, tmp_path, monkeypatch)
    assert (workers.members(Role.DECODE), workers.ended) == (["c-decode-0", "c-decode-1"], [])
    workers.ready.add("c-decode-1")
    await asyncio.sleep(0.05)
    assert (workers.members(Role.DECODE), workers.ended) == (["c-decode-1"], ["c-decode-0"])
    assert workers.members(Role.PREFILL) == ["c-prefill-0"]
    assert workers.told == ["  decode-0: its node is drained"]
    await scaler.close()


async def test_a_drained_nodes_worker_ends_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without another worker of its role: its requests then wait for the new one."""
    workers = Invented()
    workers.left = {"c-decode-0": 30.0}
    scaler = await looks(workers, tmp_path, monkeypatch)
    assert workers.ended == []
    workers.left = {"c-decode-0": 26.0}
    await asyncio.sleep(0.05)
    assert workers.ended == ["c-decode-0"]
    await scaler.close()


async def test_workers_that_fill_nodes_are_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their number follows the nodes, and a node that is drained counts no more."""
    workers = Invented()
    await workers.add(Role.DECODE)
    workers.ready.add("c-decode-1")
    workers.left = {"c-decode-0": math.inf}
    filled = {"fill_nodes": True, "resources": {"decode": 1}}
    scaler = await looks(workers, tmp_path, monkeypatch, decode=filled)
    assert (workers.members(Role.DECODE), workers.ended) == (["c-decode-1"], ["c-decode-0"])
    await scaler.close()


async def test_nothing_is_replaced_after_the_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workers = Invented()
    scaler = await looks(workers, tmp_path, monkeypatch)
    scaler.stop()
    workers.left = {"c-decode-0": 1.0}
    await asyncio.sleep(0.05)
    assert (len(workers.all), workers.ended, workers.told) == (2, [], [])
    await scaler.close()


async def test_outdated_workers_are_replaced_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workers = Invented()
    workers.all.append("c-decode-1")
    workers.old = {"c-decode-0", "c-decode-1"}
    workers.ready -= {"c-decode-1"}
    scaler = await looks(workers, tmp_path, monkeypatch)
    assert (workers.members(Role.DECODE), workers.ended) == (["c-decode-0", "c-decode-2"], ["c-decode-1"])
    workers.ready.add("c-decode-2")
    await asyncio.sleep(0.05)
    assert (workers.members(Role.DECODE), workers.ended) == (["c-decode-2", "c-decode-3"], ["c-decode-1", "c-decode-0"])
    assert workers.told[0] == "  decode-1: it was started with other settings, and is replaced"
    assert workers.members(Role.PREFILL) == ["c-prefill-0"]
    await scaler.close()


async def test_outdated_workers_stay_if_a_new_one_can_not_be_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workers = Invented()
    workers.all += ["c-decode-1", "c-decode-2"]
    workers.ready = workers.old = set(workers.all)
    scaler = await looks(workers, tmp_path, monkeypatch)
    assert workers.members(Role.DECODE) == ["c-decode-1", "c-decode-2", "c-decode-3"]
    await workers.remove("c-decode-3")  # given up
    await asyncio.sleep(0.05)
    assert workers.members(Role.DECODE) == ["c-decode-1", "c-decode-2"]
    await scaler.close()
