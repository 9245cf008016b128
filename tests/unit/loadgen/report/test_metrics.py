"""Figures from records."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preft_loadgen.measure.record import Record, Run
from preft_loadgen.report.metrics import percentile, spread, summarize
from preft_loadgen.report.progress import Live, progress
from preft_loadgen.report.slo import Slo
from unit.loadgen.report.results import EVIL, GOOD, NONE, RUN


def test_a_summary_counts_answers_only() -> None:
    found = summarize(RUN, 2, slo=Slo(ttft=0.35))
    assert (found.adapters, found.requests, found.answers, found.errors, found.cancelled) == (2, 5, 3, 1, 1)
    assert (found.tokens, found.prompt_tokens) == (10, 13)
    assert (found.tokens_per_s, found.total_tokens_per_s, found.requests_per_s) == (5.0, 11.5, 1.5)
    assert found.ttft is not None
    assert (found.ttft.p50, found.ttft.max) == (0.3, 0.4)
    assert found.errors_by_kind == {"http 503": 1}
    assert (found.first_error or "").startswith("503")


def test_inter_token_latencies_are_weighed_by_tokens() -> None:
    found = summarize(RUN, 2)
    assert found.itl is not None
    assert found.gap is not None
    assert found.tpot is not None
    assert found.itl.mean == pytest.approx((0.01 + 0.03 + 4 * 0.005 + 0.3) / 7)
    assert found.itl.p50 == pytest.approx(0.005)
    assert found.gap.mean == pytest.approx((0.01 + 0.03 + 0.02 + 0.3) / 4)
    assert found.tpot.p50 == pytest.approx(0.02)


def test_goodput_counts_failures_as_bad_and_leaves_cancelled_out() -> None:
    found = summarize(RUN, 2, slo=Slo(ttft=0.35)).goodput
    assert found is not None
    assert (found.slo, found.share, found.requests_per_s) == ("ttft=0.35", 0.5, 1.0)
    assert summarize(RUN, 2).goodput is None


def test_planned_and_achieved_rate() -> None:
    found = summarize(RUN, 2).rate
    assert found is not None
    assert (found.planned, found.achieved, found.delay.max) == (10.0, 10.0, 0.01)
    assert summarize(Run(GOOD, 2.0), 2).rate is None


def test_the_share_of_first_uses() -> None:
    found = summarize(Run((*GOOD, Record("a", 0.0, 1.0, ttft=0.2, tokens=1)), 2.0), 2).cold
    assert found is not None
    assert found.adapters == 1  # the other one was used once
    assert (found.ttft_first, found.ttft_later) == (0.1, pytest.approx(0.3))
    assert found.share == 0.0  # the first use was no slower
    slow = (Record("a", 0.0, 1.0, ttft=0.9, tokens=1), Record("a", 1.0, 1.0, ttft=0.1, tokens=1))
    cold = summarize(Run(slow, 2.0), 1).cold
    assert cold is not None
    assert cold.share == pytest.approx(0.8)
    assert summarize(Run(slow, 2.0), 0).cold is None  # the base model is never cold


def test_figures_by_adapter() -> None:
    found = {one.model: one for one in summarize(RUN, 2).by_adapter}
    assert set(found) == {"a", EVIL}
    assert (found["a"].requests, found["a"].errors, found["a"].tokens) == (4, 1, 5)
    assert found["a"].tokens_per_s == 2.5
    assert summarize(RUN, 0).by_adapter == ()


def test_a_run_of_failures_has_a_summary_too() -> None:
    found = summarize(NONE, 1, slo=Slo(ttft=1))
    assert (found.tokens, found.ttft, found.itl, found.tpot, found.errors) == (0, None, None, None, 1)
    assert found.goodput is not None
    assert found.goodput.share == 0.0
    assert summarize(Run((), 0.0), 1).tokens_per_s == 0.0


@settings(deadline=None)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1), st.floats(0, 100))
def test_percentiles_lie_between_the_extremes(values: list[float], percent: float) -> None:
    assert min(values) - 1e-9 <= percentile(values, percent) <= max(values) + 1e-9
    assert percentile(values, 0) == min(values)
    assert percentile(values, 100) == max(values)
    assert percentile([], percent) == 0.0
    found = spread(values)
    assert found is not None
    assert found.p50 <= found.p90 <= found.p99 <= found.max


@pytest.mark.parametrize("force", [False, True])
def test_progress_is_for_terminals(force: bool, capsys: pytest.CaptureFixture[str]) -> None:
    with progress("2 adapters", 4, force=force) as bar:
        live = Live(bar)
        for record in RUN.records[:4]:
            live(record)
    shown = capsys.readouterr().err
    assert ("2 adapters" in shown) is force
    assert ("tokens/s, 1 failed" in shown) is force
