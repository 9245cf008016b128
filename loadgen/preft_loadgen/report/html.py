"""One self-contained HTML page: figures, plots, errors. Loads nothing from anywhere."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from jinja2 import Environment, select_autoescape

from preft_loadgen.report.files import Results, write_text
from preft_loadgen.report.metrics import Spread
from preft_loadgen.report.plots import svg_plots
from preft_loadgen.report.tables import notes

TEMPLATE = Path(__file__).with_name("report.html.jinja")
MOST_ADAPTERS = 100  # in the table by adapter; the JSON file has all


def write_html(results: Results, path: Path) -> None:
    """Names and messages come from servers, so all text is escaped. Raises InvalidArgument if it can't be written."""
    environment = Environment(autoescape=select_autoescape(default=True, default_for_string=True))
    environment.filters["ms"] = _milliseconds
    summaries = [one.summary for one in results.measured]
    page = environment.from_string(TEMPLATE.read_text()).render(
        made=time.strftime("%Y-%m-%d %H:%M"),
        results=results,
        summaries=summaries,
        last=summaries[-1],
        plots=svg_plots(results),
        notes=notes(summaries),
        most=MOST_ADAPTERS,
    )
    write_text(path, page)


def _milliseconds(found: Spread | None, name: str) -> Any:
    return "-" if found is None else f"{1000 * getattr(found, name):.1f}"
