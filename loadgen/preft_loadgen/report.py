"""Reports of runs: one summary per adapter count, a table of summaries, and a progress bar."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

from tqdm import tqdm

from preft_loadgen.driver import Run
from preft_loadgen.table import table


@dataclass(frozen=True, slots=True)
class Summary:
    """One run. Latencies in seconds: `ttft` to the first text, `itl` between arrivals. Rates count answers only."""

    adapters: int
    requests: int
    errors: int
    tokens: int
    seconds: float
    tokens_per_second: float
    requests_per_second: float
    ttft_p50: float
    ttft_p99: float
    itl_p50: float
    itl_p99: float
    first_error: str | None = None


def summarize(run: Run, adapters: int) -> Summary:
    """The figures of `run`; latencies are 0 if every request failed."""
    good = [record for record in run.records if record.error is None]
    errors = [record.error for record in run.records if record.error is not None]
    ttfts = [record.ttft for record in good]
    gaps = [gap for record in good for gap in record.gaps]
    tokens = sum(record.tokens for record in good)
    return Summary(
        adapters=adapters,
        requests=len(run.records),
        errors=len(errors),
        tokens=tokens,
        seconds=run.seconds,
        tokens_per_second=tokens / run.seconds,
        requests_per_second=len(good) / run.seconds,
        ttft_p50=percentile(ttfts, 50),
        ttft_p99=percentile(ttfts, 99),
        itl_p50=percentile(gaps, 50),
        itl_p99=percentile(gaps, 99),
        first_error=errors[0] if errors else None,
    )


def percentile(values: Sequence[float], percent: float) -> float:
    """The value that `percent` % of `values` don't exceed, linearly interpolated. 0 without values."""
    if not values:
        return 0.0
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def summary_table(summaries: Sequence[Summary]) -> str:
    """One line per summary, latencies in milliseconds."""
    head = ["adapters", "tokens/s", "requests/s", "TTFT p50 ms", "p99", "ITL p50 ms", "p99", "failed"]
    rows = [
        [
            str(summary.adapters) if summary.adapters else "base",
            f"{summary.tokens_per_second:.0f}",
            f"{summary.requests_per_second:.1f}",
            *(
                f"{1000 * value:.1f}"
                for value in (summary.ttft_p50, summary.ttft_p99, summary.itl_p50, summary.itl_p99)
            ),
            str(summary.errors),
        ]
        for summary in summaries
    ]
    return table([head, *rows], right=range(len(head)))


def progress(label: str, total: int, *, force: bool = False) -> tqdm[NoReturn]:
    """A bar on stderr for a `with` block, if stderr is a terminal. With `force` always, and the full bar stays."""
    return tqdm(desc=label, total=total, leave=force, disable=False if force else None)
