"""Results as files: JSON with all figures, CSV with one line per request."""

from __future__ import annotations

import csv
import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from preft_loadgen.errors import InvalidArgument
from preft_loadgen.measure.compare import Comparison
from preft_loadgen.measure.saturation import Saturation
from preft_loadgen.measure.sweep import Measured

FORMAT = 1
COLUMNS = (
    *("target", "load", "round", "adapters", "model", "turn", "started", "delay", "ttft", "tpot", "e2e"),
    *("tokens", "prompt_tokens", "cancelled", "kind", "error"),
)


@dataclass(frozen=True, slots=True)
class Results:
    """What one command measured. `load` are the flags, in plain values."""

    load: dict[str, Any]
    measured: tuple[Measured, ...]
    saturations: tuple[Saturation, ...] = ()
    comparison: Comparison | None = None

    def as_json(self) -> dict[str, Any]:
        """The figures, with None in place of numbers that aren't finite."""
        runs = [{**asdict(one.summary), "churn": [asdict(change) for change in one.changes]} for one in self.measured]
        figures: dict[str, Any] = {"format": FORMAT, "load": self.load, "runs": runs}
        if self.saturations:
            figures["saturation"] = [
                {"adapters": one.adapters, "sustained_requests_per_s": one.sustained} for one in self.saturations
            ]
        if self.comparison is not None:
            figures["ratios"] = [asdict(one) for one in self.comparison.ratios]
            figures["crossovers"] = [asdict(one) for one in self.comparison.crossovers]
        cleaned: dict[str, Any] = _finite(figures)
        return cleaned


def write_json(results: Results, path: Path) -> None:
    """`-` is stdout. Raises InvalidArgument if the file can't be written."""
    text = json.dumps(results.as_json(), indent=2, allow_nan=False) + "\n"
    if path == Path("-"):
        sys.stdout.write(text)
    else:
        write_text(path, text)


def write_csv(results: Results, path: Path) -> None:
    """Times in seconds; empty where there is none. Raises InvalidArgument if the file can't be written."""
    try:
        with path.open("w", newline="") as file:
            lines = csv.writer(file)
            lines.writerow(COLUMNS)
            for one in results.measured:
                lines.writerows(_lines(one))
    except OSError as error:
        raise InvalidArgument(f"{path} can't be written: {error.strerror}") from error


def write_text(path: Path, text: str) -> None:
    """Raises InvalidArgument if the file can't be written."""
    try:
        path.write_text(text)
    except OSError as error:
        raise InvalidArgument(f"{path} can't be written: {error.strerror}") from error


def check_writable(paths: Sequence[Path | None]) -> None:
    """Raises InvalidArgument if a file can't be written: better before a long measurement than after it."""
    for path in paths:
        if path is not None and path != Path("-"):
            if not path.parent.is_dir():
                raise InvalidArgument(f"{path} can't be written: its folder doesn't exist")
            if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
                raise InvalidArgument(f"{path} can't be written: it is a folder, or nobody may write there")


def _lines(one: Measured) -> list[list[Any]]:
    summary = one.summary
    return [
        [
            *(summary.target, summary.load, summary.round, summary.adapters, record.model, record.turn),
            *(record.started, record.delay),
            *((record.ttft, record.tpot, record.seconds) if record.answered else (None, None, None)),
            *(record.tokens, record.prompt_tokens, int(record.cancelled), record.kind, record.error),
        ]
        for record in one.run.records
    ]


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return value
