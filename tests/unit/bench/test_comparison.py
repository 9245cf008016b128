"""Ratios, turns and the steady state."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.comparison import Comparison, comparison_table, steady_rate, take_turns, turns

ONE = Comparison("decode", "tokens/s", ours=(90.0, 50.0, 99.0), reference=(100.0, 100.0, 100.0), bar=0.9, how="")


def test_the_median_of_the_rounds_ratios_counts() -> None:
    assert ONE.ratios == (0.9, 0.5, 0.99)
    assert ONE.ratio == 0.9
    assert ONE.reached


def test_the_table_says_what_is_below_its_bar() -> None:
    low = Comparison("http", "tokens/s", ours=(7.0,), reference=(10.0,), bar=0.8, how="")
    lines = comparison_table([ONE, low]).splitlines()
    assert lines[1].split() == ["decode", "90", "100", "tokens/s", "0.90", "0.50", "-", "0.99", "0.90", "ok"]
    assert lines[2].split()[-2:] == ["0.80", "below"]


async def test_sides_take_turns_and_the_first_round_is_dropped() -> None:
    calls: list[tuple[str, int]] = []
    running = 0

    def side(name: str, speed: float):
        async def measure(number: int) -> float:
            nonlocal running
            running += 1
            assert running == 1
            calls.append((name, number))
            running -= 1
            return speed + number

        return measure

    steps: list[int] = []
    speeds = await take_turns([side("a", 10), side("b", 20)], 2, lambda: steps.append(1))
    assert speeds == [(10, 11), (20, 21)]
    assert len(steps) == len(calls) == turns(2, 2) == 6
    assert sorted(calls) == [(name, number) for name in "ab" for number in (-1, 0, 1)]
    assert {calls[place][0] for place in (0, 2, 4)} == {"a", "b"}  # not always the same one first


def test_the_steady_state_leaves_out_ramps() -> None:
    early, late = [1.0, 2.0, 3.0, 4.0, 5.0], [2.5, 3.5, 4.5, 5.5, 6.5]
    # from 2.5 (late's first) to 5.0 (early's last): 3, 4, 5 and 3.5, 4.5
    assert steady_rate([early, late]) == 5 / 2.5
    with pytest.raises(ValueError, match="never all running"):
        steady_rate([[1.0, 2.0], [3.0, 4.0]])


@given(st.integers(1, 20), st.integers(2, 50), st.floats(1e-4, 1), st.floats(0, 0.9))
def test_a_lockstep_batch_has_its_step_rate(requests: int, tokens: int, step: float, start: float) -> None:
    arrivals = [[start + step * number for number in range(tokens)] for _ in range(requests)]
    assert steady_rate(arrivals) == pytest.approx(requests / step, rel=1e-6)
