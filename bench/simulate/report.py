"""Shows the figures of several runs: a table, a JSON file, and plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from bench.simulate.figures import Run

COLUMNS = {
    "loads/1000": ("loads_per_1000", 1.0, ".1f"),
    "adapters/step": ("adapters_per_step", 1.0, ".2f"),
    "TTFT p50 ms": ("ttft_p50", 1e3, ".0f"),
    "TTFT p99 ms": ("ttft_p99", 1e3, ".0f"),
    "tail wait max s": ("tail_wait_max", 1.0, ".2f"),
    "over bound %": ("tail_over_bound", 100.0, ".2f"),
    "balance": ("balance", 1.0, ".2f"),
    "decision p50 us": ("real_decision_p50", 1e6, ".0f"),
    "decision p99 us": ("real_decision_p99", 1e6, ".0f"),
    "decisions/s": ("real_decisions_per_second", 1.0, ",.0f"),
    "requests/s": ("real_requests_per_second", 1.0, ",.0f"),
    "longest turn ms": ("real_turn_max", 1e3, ".2f"),
}


def mean(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each figure. Of the longest turns and waits, the longest."""
    return {
        key: max(run[key] for run in runs) if key.endswith("_max") else fmean(run[key] for run in runs)
        for key in runs[0]
    }


def table(runs: Mapping[str, Mapping[str, float]]) -> str:
    """A Markdown table, a line per policy."""
    lines = ["| policy | " + " | ".join(COLUMNS) + " |", "|---|" + "---:|" * len(COLUMNS)]
    for policy, figures in runs.items():
        cells = [format(figures[key] * factor, form) for key, factor, form in COLUMNS.values()]
        lines.append(f"| {policy} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(runs: Sequence[Run], path: Path) -> None:
    """Adapter loads over the p99 of the time to first token, and the distribution of that time, as one SVG file.

    Needs matplotlib, from the extra `train`.
    """
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "preft"  # equal figures give equal files
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4))
    for run in runs:
        figures = run.virtual()
        left.plot(figures["ttft_p99"], figures["loads_per_1000"], "o", label=run.policy)
        times = sorted(one.first_token - one.arrival.at for one in run.requests if one.first_token >= 0)
        shares = [1 - index / len(times) for index in range(len(times))]
        every = max(1, len(times) // 200)
        last = times[-every:], shares[-every:]
        right.plot(times[:-every:every] + last[0][-1:], shares[:-every:every] + last[1][-1:], label=run.policy)
    left.set(xlabel="p99 of time to first token (s)", ylabel="adapter loads per 1,000 requests", xscale="log")
    right.set(xlabel="time to first token (s)", ylabel="share of requests that wait longer", xscale="log", yscale="log")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    left.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
