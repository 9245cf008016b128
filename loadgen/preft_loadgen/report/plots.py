"""Plots of results, with matplotlib, which the extra `plots` installs."""

from __future__ import annotations

import io
import math
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from preft_loadgen.errors import InvalidArgument
from preft_loadgen.report.files import Results
from preft_loadgen.report.metrics import Spread, Summary
from preft_loadgen.table import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 7.0, 4.0  # inches
Value = Callable[[Summary], float | None]
Series = list[tuple[float, float]]


def check_plots() -> None:
    """Raises InvalidArgument if matplotlib is missing."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise InvalidArgument(
            "plots need matplotlib: pip install 'preft-serve[plots]', or leave the plots out"
        ) from error


def write_png(results: Results, path: Path) -> None:
    """The main plot. Raises InvalidArgument if the file can't be written."""
    figure = _figures(results)[0][1]
    try:
        figure.savefig(path, format="png", dpi=150)
    except OSError as error:
        raise InvalidArgument(f"{path} can't be written: {error.strerror}") from error


def svg_plots(results: Results) -> list[tuple[str, str]]:
    """All plots, the main one first: title and SVG text."""
    found = []
    for title, figure in _figures(results):
        text = io.StringIO()
        figure.savefig(text, format="svg")
        svg = text.getvalue()
        found.append((title, svg[svg.index("<svg") :]))
    return found


def _figures(results: Results) -> list[tuple[str, Figure]]:
    summaries = [one.summary for one in results.measured]
    if results.saturations:
        return [
            ("Time to first token by requests per second", _by_rate(summaries, lambda one: one.ttft, "TTFT, ms")),
            ("Time per output token by requests per second", _by_rate(summaries, lambda one: one.tpot, "TPOT, ms")),
        ]
    figures = [
        ("Output tokens per second by adapter count", _speeds(results, summaries)),
        ("Time to first token", _by_count(summaries, lambda one: one.ttft, "TTFT, ms")),
        ("Inter-token latency", _by_count(summaries, lambda one: one.itl, "ITL, ms")),
    ]
    if results.comparison is not None:
        figures.append(("Ratio to the reference", _ratios(results)))
    return [*figures, ("Output tokens per second over time", _over_time(results))]


def _speeds(results: Results, summaries: Sequence[Summary]) -> Figure:
    figure, axes = _axes("output tokens/s")
    targets = _targets(summaries)
    for target in targets:
        points = _points([one for one in summaries if one.target == target], lambda one: one.tokens_per_s)
        axes.plot(*_places(points), marker="o", label=_plain(target) or "tokens/s")
    for crossing in results.comparison.crossovers if results.comparison else ():
        place = math.log2(crossing.adapters + 1)
        axes.axvline(place, color="gray", linestyle="--")
        verb = "overtakes" if crossing.begins else "falls behind"
        note = f"{_plain(crossing.target)} {verb}\n{_plain(crossing.reference)} at {crossing.adapters:.3g}"
        axes.annotate(note, (place, 0.03), xycoords=("data", "axes fraction"), rotation=90, fontsize=8, ha="right")
    return _done(figure, axes, summaries)


def _by_count(summaries: Sequence[Summary], spread: Callable[[Summary], Spread | None], label: str) -> Figure:
    figure, axes = _axes(label)
    for target in _targets(summaries):
        own = [one for one in summaries if one.target == target]
        for name, style in (("p50", "-"), ("p99", ":")):
            points = _points(own, partial(_percentile, spread, name))
            axes.plot(*_places(points), style, marker="o", label=_plain(f"{target} {name}".strip()))
    return _done(figure, axes, summaries)


def _by_rate(summaries: Sequence[Summary], spread: Callable[[Summary], Spread | None], label: str) -> Figure:
    figure, axes = _axes(label)
    for count in sorted({one.adapters for one in summaries}):
        own = sorted((one for one in summaries if one.adapters == count), key=lambda one: one.requests_per_s)
        for name, style in (("p50", "-"), ("p99", ":")):
            points = [(one.requests_per_s, value) for one in own if (value := _milliseconds(spread(one), name))]
            axes.plot(*_split(points), style, marker="o", label=f"{count or 'base'}, {name}")
    axes.set_xlabel("answered requests/s")
    axes.set_yscale("log")
    axes.legend(title="adapters")
    return figure


def _ratios(results: Results) -> Figure:
    assert results.comparison is not None
    ratios = [one for one in results.comparison.ratios if one.ratio > 0]
    figure, axes = _axes("ratio of output tokens/s")
    for target in dict.fromkeys(one.target for one in ratios):
        own = sorted((one for one in ratios if one.target == target), key=lambda one: one.adapters)
        places = [math.log2(one.adapters + 1) for one in own]
        axes.plot(places, [one.ratio for one in own], marker="o", label=_plain(f"{target} / {own[0].reference}"))
        ranges = [(place, one) for place, one in zip(places, own, strict=True) if one.low is not None]
        lows, highs = [one.low or 0.0 for _, one in ranges], [one.high or 0.0 for _, one in ranges]
        axes.fill_between([place for place, _ in ranges], lows, highs, alpha=0.2)
    axes.axhline(1.0, color="gray", linewidth=1)
    return _done(figure, axes, [one.summary for one in results.measured])


def _over_time(results: Results) -> Figure:
    """Each answer's tokens, spread evenly from its first token to its end."""
    import numpy as np

    figure, axes = _axes("output tokens/s")
    for one in results.measured:
        bins = 50
        edges = np.linspace(0, max(one.run.seconds, 1e-9), bins + 1)
        speed = np.zeros(bins)
        for record in one.run.records:
            if record.tokens:
                begin, end = record.started + record.ttft, record.started + record.seconds
                shares = np.clip((edges - begin) / max(end - begin, 1e-9), 0, 1)
                speed += record.tokens * np.diff(shares)
        label = _plain(f"{one.summary.target} {one.summary.adapters or 'base'}".strip())
        axes.plot((edges[:-1] + edges[1:]) / 2, speed / np.diff(edges), linewidth=1, label=label)
    axes.set_xlabel("seconds")
    if len(results.measured) <= 10:
        axes.legend()
    return figure


def _axes(label: str) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    axes = figure.subplots()
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    return figure, axes


def _done(figure: Figure, axes: Axes, summaries: Sequence[Summary]) -> Figure:
    counts = sorted({one.adapters for one in summaries})
    axes.set_xticks([math.log2(count + 1) for count in counts], [str(count or "base") for count in counts])
    axes.set_xlabel("adapters")
    axes.set_ylim(bottom=0)
    axes.legend()
    return figure


def _targets(summaries: Sequence[Summary]) -> list[str]:
    return list(dict.fromkeys(one.target for one in summaries))


def _points(summaries: Sequence[Summary], value: Value) -> Series:
    """The median over the rounds, by adapter count."""
    values: dict[int, list[float]] = {}
    for one in summaries:
        if (found := value(one)) is not None:
            values.setdefault(one.adapters, []).append(found)
    return [(count, statistics.median(found)) for count, found in sorted(values.items())]


def _places(points: Series) -> tuple[list[float], list[float]]:
    return _split([(math.log2(count + 1), value) for count, value in points])


def _split(points: Series) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _percentile(spread: Callable[[Summary], Spread | None], name: str, one: Summary) -> float | None:
    return _milliseconds(spread(one), name)


def _plain(text: str) -> str:
    """A name without the marks of formulas, and without characters that no font has."""
    return printable(text).replace("$", r"\$")


def _milliseconds(found: Spread | None, name: str) -> float | None:
    return None if found is None else 1000 * float(getattr(found, name))
