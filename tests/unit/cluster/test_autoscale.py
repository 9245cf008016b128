"""Numbers of workers that follow the load. Workers and router are invented; tests/integration has real ones."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from preft.cluster.autoscale import Scale
from preft.core.settings import ScalingSettings

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
