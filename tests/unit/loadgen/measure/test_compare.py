"""Comparisons: turns, paired ratios and their ranges, crossovers."""

from __future__ import annotations

import math

import pytest

from preft_loadgen.errors import InvalidArgument
from preft_loadgen.measure.compare import Crossover, Ratio, Target, compare, crossovers, ratio_of
from preft_loadgen.measure.record import Record, Run
from preft_loadgen.measure.sweep import ClosedLoop, Load, Population
from preft_loadgen.report.metrics import Summary, summarize
from preft_loadgen.traffic.lengths import Lengths
from preft_loadgen.traffic.prompts import RandomPrompts
from unit.loadgen.fake_server import FakeServer

MODELS = Population("base", ("a", "b"))
LOAD = Load(6, RandomPrompts(Lengths(3, 3), Lengths(4, 4)), ClosedLoop(2), warm_up=False)


def summary(target: str, number: int, speed: int, adapters: int = 1) -> Summary:
    return summarize(Run((Record("a", 0.0, 1.0, tokens=speed),), 1.0), adapters, target=target, round=number)


async def test_targets_take_turns_with_equal_requests() -> None:
    servers = [FakeServer(("a", "b")), FakeServer(("a", "b"))]
    targets = [Target(name, server, MODELS) for name, server in zip("xy", servers, strict=True)]
    found = await compare(targets, LOAD, [0, 2], 3)
    order = [(one.adapters, one.round, one.target) for one in found.summaries]
    assert order[:6] == [(0, 0, "x"), (0, 0, "y"), (0, 1, "y"), (0, 1, "x"), (0, 2, "x"), (0, 2, "y")]
    assert [request.prompt for request in servers[0].requests] == [request.prompt for request in servers[1].requests]
    assert len({request.prompt for request in servers[0].requests}) == 36
    assert [(one.target, one.reference, one.adapters, len(one.rounds)) for one in found.ratios] == [
        ("y", "x", 0, 3),
        ("y", "x", 2, 3),
    ]


async def test_a_slow_target_is_measured_in_the_first_rounds_alone() -> None:
    slow = Target("slow", FakeServer(("a", "b")), MODELS, rounds=1)
    quick = Target("quick", FakeServer(("a", "b")), MODELS)
    found = await compare([quick, slow], LOAD, [0, 2], 2)
    assert sorted((one.target, one.adapters, one.round) for one in found.summaries) == [
        *(("quick", count, number) for count in (0, 2) for number in (0, 1)),
        *(("slow", count, 0) for count in (0, 2)),
    ]
    assert [(one.target, one.adapters, len(one.rounds)) for one in found.ratios] == [("slow", 0, 1), ("slow", 2, 1)]
    assert len(ratio_of(found.summaries, "quick", "slow", 2).rounds) == 1


def test_a_ratio_and_its_range() -> None:
    rounds = [summary("x", number, 100) for number in range(3)]
    rounds += [summary("y", number, speed) for number, speed in enumerate((110, 121, 100))]
    found = ratio_of(rounds, "y", "x", 1)
    assert found.rounds == (1.1, 1.21, 1.0)
    assert found.ratio == pytest.approx(1.1)
    half = 4.303 * math.log(1.1) / math.sqrt(3)  # the logarithms are 1, 2 and 0 times log 1.1
    assert found.low == pytest.approx(1.1 * math.exp(-half))
    assert found.high == pytest.approx(1.1 * math.exp(half))


def test_pairs_are_of_one_round() -> None:
    """The machine is three times as slow in the second round; the ratio doesn't notice."""
    rounds = [summary("x", 0, 300), summary("y", 0, 600), summary("x", 1, 100), summary("y", 1, 200)]
    found = ratio_of(rounds, "y", "x", 1)
    assert (found.ratio, found.low, found.high) == pytest.approx((2.0, 2.0, 2.0))


def test_rounds_without_answers_are_left_out() -> None:
    rounds = [summary("x", 0, 100), summary("y", 0, 0), summary("x", 1, 100), summary("y", 1, 50)]
    found = ratio_of(rounds, "y", "x", 1)
    assert (found.ratio, found.low, found.rounds) == (0.5, None, (0.5,))
    assert math.isnan(ratio_of(rounds[:2], "y", "x", 1).ratio)
    wild = [summary("x", 0, 1), summary("y", 0, 10**9), summary("x", 1, 10**9), summary("y", 1, 1)]
    assert math.isfinite(ratio_of(wild, "y", "x", 1).high or math.inf)


def ratio(adapters: int, value: float, width: float | None = 0.01) -> Ratio:
    low, high = (None, None) if width is None else (value - width, value + width)
    return Ratio("y", "x", adapters, value, low, high, (value,))


def test_crossovers() -> None:
    assert crossovers([ratio(1, 0.5), ratio(3, 0.8)]) == []
    (found,) = crossovers([ratio(0, 0.5), ratio(1, 0.5), ratio(3, 2.0), ratio(7, 3.0)])
    assert found == Crossover("y", "x", pytest.approx(2**1.5 - 1), True, 1, 3, True)
    (lost,) = crossovers([ratio(3, 0.9, 0.2), ratio(1, 1.5)])
    assert (lost.begins, lost.above, lost.below, lost.certain) == (False, 1, 3, False)
    assert not crossovers([ratio(1, 0.9, None), ratio(3, 1.5, None)])[0].certain
    assert crossovers([ratio(1, math.nan), ratio(3, 1.5)]) == []


async def test_what_cannot_be_compared() -> None:
    server = FakeServer(("a", "b"))
    one = Target("x", server, MODELS)
    for targets, counts, rounds in (
        ([one], [1], 1),
        ([one, one], [1], 1),
        ([one, Target("y", server, Population("base", ("a",)))], [2], 1),
        ([one, Target("y", server, Population(None, ("a",)))], [0, 1], 1),
        ([one, Target("y", server, MODELS)], [1], 0),
    ):
        with pytest.raises(InvalidArgument):
            await compare(targets, LOAD, counts, rounds)
    assert server.requests == []
