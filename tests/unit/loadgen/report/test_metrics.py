"""Figures from records, and how they look."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from preft_loadgen.driver import Record, Run

from preft_loadgen.report import percentile, progress, summarize, summary_table

RUN = Run(
    (
        Record("a", 0.0, 1.0, ttft=0.1, gaps=(0.01, 0.03), tokens=3),
        Record("b", 0.0, 2.0, ttft=0.3, gaps=(0.02,), tokens=2),
        Record("a", 0.5, 0.1, error="503: nobody there"),
    ),
    seconds=2.0,
)


def test_a_summary_counts_answers_only() -> None:
    summary = summarize(RUN, adapters=2)
    assert (summary.adapters, summary.requests, summary.errors, summary.tokens) == (2, 3, 1, 5)
    assert summary.tokens_per_second == 2.5
    assert summary.requests_per_second == 1.0
    assert summary.ttft_p50 == pytest.approx(0.2)
    assert summary.itl_p50 == pytest.approx(0.02)
    assert summary.first_error == "503: nobody there"


def test_a_run_of_failures_has_a_summary_too() -> None:
    summary = summarize(Run(RUN.records[2:], 1.0), adapters=1)
    assert (summary.tokens, summary.ttft_p99, summary.itl_p50, summary.errors) == (0, 0.0, 0.0, 1)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1), st.floats(0, 100))
def test_percentiles_lie_between_the_extremes(values: list[float], percent: float) -> None:
    assert min(values) <= percentile(values, percent) <= max(values)
    assert percentile(values, 0) == min(values)
    assert percentile(values, 100) == max(values)


def test_the_table_has_a_line_per_run() -> None:
    lines = summary_table([summarize(RUN, 0), summarize(RUN, 8)]).splitlines()
    assert lines[0].split()[:2] == ["adapters", "tokens/s"]
    assert lines[1].split() == ["base", "2", "1.0", "200.0", "298.0", "20.0", "29.8", "1"]
    assert lines[2].split()[0] == "8"
    assert len(set(map(len, lines))) == 1


@pytest.mark.parametrize("force", [False, True])
def test_progress_is_for_terminals(force: bool, capsys: pytest.CaptureFixture[str]) -> None:
    with progress("2 adapters", 3, force=force) as bar:
        for _ in range(3):
            bar.update()
    shown = capsys.readouterr().err
    assert ("2 adapters" in shown) is force
