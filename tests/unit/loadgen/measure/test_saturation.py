"""The search for the rate that a server sustains."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from preft_loadgen.errors import InvalidArgument
from preft_loadgen.measure.record import Record, Run
from preft_loadgen.measure.saturation import RATES, keeps_up, saturate
from preft_loadgen.measure.sweep import Load, Measured, Population, population
from preft_loadgen.report.metrics import summarize
from preft_loadgen.report.slo import Slo
from preft_loadgen.traffic.lengths import Lengths
from preft_loadgen.traffic.prompts import RandomPrompts
from unit.loadgen.fake_server import FakeServer

PROMPTS = RandomPrompts(Lengths(3, 3), Lengths(4, 4))


async def test_it_finds_what_a_server_sustains() -> None:
    server = FakeServer(seconds=0.02, at_once=4)  # 200 requests per second at best
    (found,) = await saturate(server, Load(40, PROMPTS, warm_up=False), [2], await population(server))
    labels = [one.summary.load for one in found.measured]
    assert (labels[0], labels[-1], len(labels)) == ("one at a time", "all at once", RATES + 2)
    rates = [one.run.planned or 0.0 for one in found.measured[1:-1]]
    assert found.sustained in (None, *rates)  # this machine may be too busy for any
    assert len({request.prompt for request in server.requests}) == len(server.requests)


def measured(ttfts: Sequence[float], slo: Slo | None = None, error: str | None = None) -> Measured:
    records = [Record("a", float(number), ttft, ttft=ttft, tokens=1) for number, ttft in enumerate(ttfts)]
    run = Run((*records, Record("a", 99.0, 1.0, error=error)) if error else tuple(records), 100.0, 1.0)
    return Measured(summarize(run, 1, slo=slo), run)


STEADY, GROWING = [0.1] * 12, [0.1 * number for number in range(1, 13)]


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (measured(STEADY), True),
        (measured(GROWING), False),
        (measured(GROWING[::-1]), True),
        (measured(STEADY, error="503"), False),
        (measured(STEADY, Slo(ttft=0.2)), True),
        (measured([0.01] * 10 + [0.02] * 2, Slo(ttft=0.015)), False),
    ],
)
def test_which_runs_keep_up(run: Measured, expected: bool) -> None:
    assert keeps_up(run) is expected


async def test_a_slo_that_nothing_keeps_is_sustained_by_no_rate() -> None:
    server = FakeServer(seconds=0.005)
    load = Load(8, PROMPTS, warm_up=False, slo=Slo(ttft=0.001))
    (found,) = await saturate(server, load, [0], await population(server))
    assert found.sustained is None


async def test_a_server_that_answers_nothing_has_no_rate() -> None:
    with pytest.raises(InvalidArgument, match="no request was answered: 404"):
        await saturate(FakeServer(), Load(4, PROMPTS), [1], Population("base", ("gone",)))
