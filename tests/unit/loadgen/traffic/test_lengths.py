"""Lengths: what they are read from, and what they draw."""

from __future__ import annotations

import random
import statistics

import pytest

from preft_loadgen.errors import InvalidArgument
from preft_loadgen.traffic.lengths import Lengths, LogNormal, parse_length


@pytest.mark.parametrize(
    ("text", "expected"),
    [("128", Lengths(128, 128)), ("64-256", Lengths(64, 256)), ("lognormal:200,150.5", LogNormal(200, 150.5))],
)
def test_lengths_are_read_and_written(text: str, expected: object) -> None:
    assert parse_length(text) == expected
    assert str(expected) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "0",
        "-3",
        "5-",
        "9-3",
        "a",
        "1-2-3",
        "1.5",
        "99999999",
        "lognormal:",
        "lognormal:9",
        "lognormal:0,1",
        "lognormal:5,0",
        "lognormal:nan,1",
        "lognormal:1,inf",
        "normal:5,1",
    ],
)
def test_lengths_that_are_none(text: str) -> None:
    with pytest.raises(InvalidArgument):
        parse_length(text)


def test_a_range_includes_both_ends() -> None:
    source = random.Random(1)
    assert {Lengths(2, 4).draw(source) for _ in range(100)} == {2, 3, 4}


def test_lognormal_has_its_mean_and_deviation() -> None:
    source = random.Random(1)
    drawn = [LogNormal(200, 100).draw(source) for _ in range(20_000)]
    assert statistics.fmean(drawn) == pytest.approx(200, rel=0.03)
    assert statistics.stdev(drawn) == pytest.approx(100, rel=0.06)
    assert statistics.median(drawn) < 185
    assert min(LogNormal(1, 5).draw(source) for _ in range(500)) == 1
