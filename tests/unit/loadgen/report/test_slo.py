"""Service level objectives: units, what is good, what can't be read."""

from __future__ import annotations

import pytest

from preft_loadgen.errors import InvalidArgument
from preft_loadgen.measure.record import Record
from preft_loadgen.report.slo import Slo, parse_slo

GOOD = Record("a", 0.0, 2.0, ttft=0.5, gaps=(1.0, 0.5), counts=(1, 2), tokens=4)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ttft=500ms,itl=0.05", Slo(ttft=0.5, itl=0.05)),
        ("e2e=2s, tpot=900us", Slo(e2e=2.0, tpot=0.0009)),
        ("ttft=1e-1", Slo(ttft=0.1)),
    ],
)
def test_what_is_read(text: str, expected: Slo) -> None:
    assert parse_slo(text) == expected
    assert parse_slo(str(expected)) == expected


@pytest.mark.parametrize(
    "text",
    ["", "ttft", "ttft=", "ttft=x", "ttft=0", "ttft=-1ms", "ttft=5m", "itl=1,itl=2", "speed=1", "ttft=nan", "ttft=inf"],
)
def test_what_is_none(text: str) -> None:
    with pytest.raises(InvalidArgument):
        parse_slo(text)


@pytest.mark.parametrize(
    ("slo", "good"),
    [
        (Slo(), True),
        (Slo(ttft=0.5, itl=0.5, tpot=0.5, e2e=2.0), True),
        (Slo(ttft=0.49), False),
        (Slo(itl=0.49), False),
        (Slo(tpot=0.49), False),
        (Slo(e2e=1.99), False),
    ],
)
def test_what_is_good(slo: Slo, good: bool) -> None:
    assert slo.kept(GOOD) is good


def test_failed_and_one_token_answers() -> None:
    assert not Slo().kept(Record("a", 0.0, 1.0, error="no"))
    assert not Slo().kept(Record("a", 0.0, 1.0, cancelled=True))
    assert Slo(itl=0.001, tpot=0.001).kept(Record("a", 0.0, 1.0, tokens=1))
