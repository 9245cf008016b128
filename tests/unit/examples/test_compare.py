"""The comparison's table and plot, from figures; that the committed ones are from the committed script's methods."""

from __future__ import annotations

import json
from pathlib import Path

from personal_memory import compare


def some_results() -> list[compare.Result]:
    return [
        compare.Result(method, rank, 1000 * rank, 0.5 / rank, 0.9)
        for rank in compare.RANKS
        for method in compare.METHODS
    ]


def test_a_row_per_method_and_rank(tmp_path: Path) -> None:
    rows = compare.markdown(some_results()).splitlines()
    assert len(rows) == 2 + len(compare.RANKS) * len(compare.METHODS)
    assert rows[2] == "| LoRA, all tokens | 1 | 1,000 | 0.5000 | 90.0% |"
    compare.plot(some_results(), tmp_path / "plot.svg")
    assert "<svg" in (tmp_path / "plot.svg").read_text()


def test_the_committed_comparison_shows_the_finding() -> None:
    """Adapters for the prompt pass alone learn the task; all-token ones don't survive being served so."""
    record = json.loads((compare.RESULTS / "comparison.json").read_text())
    results = [compare.Result(**one) for one in record["results"]]
    assert {(one.method, one.rank) for one in results} == {(m, r) for m in compare.METHODS for r in compare.RANKS}
    assert (compare.RESULTS / "comparison.md").read_text() == compare.markdown(results)
    best = {method: max(one.accuracy for one in results if one.method == method) for method in compare.METHODS}
    assert min(best["LoRA-P"], best["LoReFT-P"], best["DiReFT-P"]) >= 0.95
    assert best["LoRA, all tokens, served prefill-only"] < best["LoRA, all tokens"]
