"""The simulator: equal seeds give equal figures, and no request is lost, whatever happens to workers."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import pytest

from bench.simulate.__main__ import main
from bench.simulate.policies import POLICIES
from bench.simulate.report import mean
from bench.simulate.scenario import CROWDED, TINY, Engine
from bench.simulate.simulation import simulate

QUICK = replace(TINY, seconds=2.5)


@pytest.mark.parametrize("policy", POLICIES)
def test_no_request_is_lost(policy: str) -> None:
    """A prefill worker and a decode worker go and come back meanwhile."""
    run = simulate(QUICK, policy, 1.0)
    figures = run.figures()
    assert figures["requests"] > 50
    assert (figures["unfinished"], figures["refused"], run.in_flight) == (0, 0, {})
    assert all(one.arrival.at < one.begun < one.first_token <= one.finished for one in run.requests)
    assert all(one.tokens == one.arrival.output for one in run.requests)
    assert figures["retried"] > 0
    assert 1 <= figures["adapters_per_step"] <= TINY.engine.slots
    assert figures["loads_per_1000"] > 0


@pytest.mark.parametrize("routers", [2, 5])
def test_several_routers_lose_no_request_and_no_slot(routers: int) -> None:
    run = simulate(replace(QUICK, routers=routers), "ours", 1.0)
    figures = run.figures()
    assert (figures["unfinished"], figures["refused"], run.in_flight) == (0, 0, {})
    assert figures["requests"] == simulate(QUICK, "ours", 1.0).figures()["requests"]
    assert all(one.tokens == one.arrival.output for one in run.requests)
    assert {one.router.name for one in run.requests} == {f"router-{number}" for number in range(routers)}
    assert figures["adapters_per_step"] <= TINY.engine.slots


def test_two_routers_do_as_well_as_one() -> None:
    """With full slots and queues, where requests of one adapter wait at both."""
    scenarios = [replace(CROWDED, seed=seed) for seed in (1, 2)]
    one, two = (
        mean([simulate(replace(scenario, routers=number), "ours", 1.0).figures() for scenario in scenarios])
        for number in (1, 2)
    )
    assert two["loads_per_1000"] <= 1.1 * one["loads_per_1000"]
    assert two["requests"] >= 0.95 * one["requests"]
    assert two["ttft_p99"] <= 1.3 * one["ttft_p99"]


def test_clients_keep_their_number_of_requests_under_way() -> None:
    run = simulate(replace(QUICK, clients=7, losses=()), "ours", 1.0)
    moments = [(one.arrival.at, 1) for one in run.requests] + [(one.finished, -1) for one in run.requests]
    under_way = [number for number in accumulate(change for _, change in sorted(moments))]
    assert 6 <= max(under_way) <= 7


def test_equal_seeds_give_equal_figures() -> None:
    one, two = (simulate(QUICK, "ours", 1.0) for _ in range(2))
    assert one.virtual() == two.virtual()
    assert one.virtual() != simulate(replace(QUICK, seed=2), "ours", 1.0).virtual()


def test_a_table_and_a_file_of_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--preset", "tiny", "--seconds", "1", "--calm", "--policy", "ours", "--out", str(tmp_path)]
    assert main(arguments) == 0
    assert "| ours |" in capsys.readouterr().out
    (written,) = tmp_path.iterdir()
    saved = json.loads(written.read_text())
    assert saved["runs"]["ours"][0]["unfinished"] == 0
    assert saved["scenario"]["adapters"] == TINY.adapters


def test_measured_engines(tmp_path: Path) -> None:
    path = tmp_path / "engine.json"
    path.write_text('{"token_seconds": 0.001}')
    assert Engine.read(path) == Engine(token_seconds=0.001)
    path.write_text('{"tokens": 1}')
    with pytest.raises(ValueError, match="unknown keys tokens"):
        Engine.read(path)
