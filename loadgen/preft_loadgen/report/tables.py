"""Summaries as text: one line per run."""

from __future__ import annotations

from collections.abc import Sequence

from preft_loadgen.measure.sweep import described
from preft_loadgen.report.files import Results
from preft_loadgen.report.metrics import Spread, Summary
from preft_loadgen.table import printable, table


def summary_table(summaries: Sequence[Summary]) -> str:
    """Latencies in milliseconds. Columns that no run needs are left out."""
    head = ["adapters", "tokens/s", "requests/s", "TTFT p50 ms", "p99", "ITL p50 ms", "p99", "failed"]
    extra = {
        "target": any(one.target for one in summaries),
        "load": any(one.load for one in summaries),
        "goodput": any(one.goodput for one in summaries),
        "wrong": any(one.verify for one in summaries),
    }
    rows = [_row(one) + [_extra(one, name) for name, shown in extra.items() if shown] for one in summaries]
    names = {"goodput": "good", "wrong": "wrong adapter"}
    head += [names.get(name, name) for name, shown in extra.items() if shown]
    return table([head, *rows], right=range(len(head)))


def _row(one: Summary) -> list[str]:
    return [
        str(one.adapters) if one.adapters else "base",
        f"{one.tokens_per_s:.0f}",
        f"{one.requests_per_s:.1f}",
        *_milliseconds(one.ttft),
        *_milliseconds(one.itl),
        str(one.errors),
    ]


def _milliseconds(found: Spread | None) -> list[str]:
    return ["-", "-"] if found is None else [f"{1000 * found.p50:.1f}", f"{1000 * found.p99:.1f}"]


def _extra(one: Summary, name: str) -> str:
    if name in ("load", "target"):
        return str(getattr(one, name))
    if name == "goodput":
        return f"{one.goodput.share:.0%}" if one.goodput else "-"
    return str(one.verify.wrong) if one.verify else "-"


def notes(summaries: Sequence[Summary]) -> list[str]:
    """Sentences about what the table can't show: late clients, errors by kind, wrong answers, cold adapters."""
    found = []
    for one in summaries:
        where = f"{one.target + ', ' if one.target else ''}{described(one.adapters)}: "
        if one.errors:
            kinds = ", ".join(f"{count} x {kind}" for kind, count in one.errors_by_kind.items())
            found.append(
                f"{where}{one.errors} of {one.requests} requests failed ({kinds}); the first: {one.first_error}"
            )
        if one.rate is not None and one.rate.achieved < 0.95 * one.rate.planned:
            found.append(
                f"{where}{one.rate.achieved:.1f} requests/s were sent where {one.rate.planned:.1f} were planned: "
                "this machine is too slow for the load"
            )
        if one.verify is not None and one.verify.wrong + one.verify.unclear:
            by = ", ".join(f"{count} as {name}" for name, count in one.verify.wrong_by.items())
            found.append(
                f"{where}{one.verify.wrong} answers are another model's ({by or 'none'}), {one.verify.unclear} are "
                f"nobody's, of {one.verify.answers}"
            )
    return [printable(sentence) for sentence in found]


def findings(results: Results) -> list[str]:
    """Sentences about searches and comparisons."""
    found = []
    for one in results.saturations:
        rate = f"{one.sustained:.3g} requests/s are sustained" if one.sustained else "no measured rate is sustained"
        found.append(f"{described(one.adapters)}: {rate}")
    for ratio in results.comparison.ratios if results.comparison else ():
        bounds = f", 95% range {ratio.low:.3f} to {ratio.high:.3f}" if ratio.low is not None else ""
        times = f"{ratio.target} has {ratio.ratio:.3f} of the tokens/s of {ratio.reference}"
        found.append(f"{described(ratio.adapters)}: {times}{bounds}")
    for crossing in results.comparison.crossovers if results.comparison else ():
        verb = "overtakes" if crossing.begins else "falls behind"
        found.append(
            f"{crossing.target} {verb} {crossing.reference} at about {crossing.adapters:.3g} adapters "
            f"(between {crossing.above} and {crossing.below}{'' if crossing.certain else '; not certain'})"
        )
    return found
