"""Arrival times: order, rates, burstiness, ramps, and what can't be read."""

from __future__ import annotations

import statistics
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preft_loadgen.errors import InvalidArgument
from preft_loadgen.traffic.arrivals import OpenLoop, parse_open_loop


def gaps(times: list[float]) -> list[float]:
    return [later - earlier for earlier, later in pairwise([0.0, *times])]


@settings(deadline=None)
@given(st.floats(0.1, 1000), st.integers(1, 50), st.integers(0, 3), st.sampled_from([None, 0.3, 1.0, 4.0]))
def test_arrivals_ascend_and_repeat(rate: float, count: int, seed: int, burstiness: float | None) -> None:
    pace = OpenLoop(rate, burstiness)
    times = pace.times(count, seed)
    assert len(times) == count
    assert times == sorted(times)
    assert times[0] >= 0
    assert times == pace.times(count, seed)


@pytest.mark.parametrize(("burstiness", "variation"), [(1.0, 1.0), (0.25, 2.0), (4.0, 0.5)])
def test_rate_and_coefficient_of_variation(burstiness: float, variation: float) -> None:
    found = gaps(OpenLoop(50, burstiness).times(20_000))
    mean = statistics.fmean(found)
    assert mean == pytest.approx(1 / 50, rel=0.05)
    assert statistics.stdev(found) / mean == pytest.approx(variation, rel=0.05)


def test_constant_intervals() -> None:
    assert gaps(OpenLoop(8, None).times(5)) == pytest.approx([0.125] * 5)


def test_a_ramp_goes_from_one_rate_to_the_other() -> None:
    found = gaps(OpenLoop(1, None, 5).times(5))
    assert found == pytest.approx([1, 1 / 2, 1 / 3, 1 / 4, 1 / 5])
    assert len(OpenLoop(1, None, 5).times(1)) == 1


@pytest.mark.parametrize(
    ("rate", "arrivals", "expected"),
    [
        ("8", "poisson", OpenLoop(8.0)),
        ("0.5-20", "constant", OpenLoop(0.5, None, 20.0)),
        ("8", "gamma:0.5", OpenLoop(8.0, 0.5)),
    ],
)
def test_what_is_read(rate: str, arrivals: str, expected: OpenLoop) -> None:
    assert parse_open_loop(rate, arrivals) == expected


@pytest.mark.parametrize(
    ("rate", "arrivals"),
    [
        ("0", "poisson"),
        ("-1", "poisson"),
        ("x", "poisson"),
        ("1-", "poisson"),
        ("1-0", "poisson"),
        ("nan", "poisson"),
        ("inf", "poisson"),
        ("8", "gamma"),
        ("8", "gamma:0"),
        ("8", "gamma:x"),
        ("8", "gamma:nan"),
        ("8", "poisson:1"),
        ("8", "often"),
        ("8", ""),
    ],
)
def test_what_is_none(rate: str, arrivals: str) -> None:
    with pytest.raises(InvalidArgument):
        parse_open_loop(rate, arrivals)
