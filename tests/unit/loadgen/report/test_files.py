"""Files: JSON, CSV, PNG, and a page that loads and runs nothing."""

from __future__ import annotations

import csv
import json
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from preft_loadgen.errors import InvalidArgument
from preft_loadgen.report.files import COLUMNS, Results, check_writable, write_csv, write_json
from preft_loadgen.report.html import write_html
from preft_loadgen.report.plots import check_plots, svg_plots, write_png
from unit.loadgen.report.results import EVIL, comparison, saturation, sweep

ALL = [sweep, saturation, comparison]


@pytest.mark.parametrize("make", ALL)
def test_json(make, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(make(), path)
    figures = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name))
    assert figures["format"] == 1
    run = figures["runs"][0]
    assert {"tokens_per_s", "total_tokens_per_s", "requests_per_s", "ttft", "itl", "tpot", "e2e", "goodput"} <= set(run)
    assert set(run["ttft"]) == {"mean", "p50", "p90", "p99", "max"}
    assert run["churn"][0]["kind"] == "add"


def test_json_of_searches_and_comparisons(capsys: pytest.CaptureFixture[str]) -> None:
    assert saturation().as_json()["saturation"] == [
        {"adapters": 2, "sustained_requests_per_s": 3.5},
        {"adapters": 0, "sustained_requests_per_s": None},
    ]
    figures = comparison().as_json()
    assert figures["ratios"][0]["rounds"] == [pytest.approx(10 / 3)] * 2
    assert figures["crossovers"][0]["begins"] is False
    write_json(sweep(), Path("-"))
    assert json.loads(capsys.readouterr().out)["load"] == {"url": EVIL}


def test_numbers_that_are_not_finite_are_null() -> None:
    results = comparison()
    assert results.comparison is not None
    ratio = replace(results.comparison.ratios[0], ratio=float("nan"), high=float("inf"))
    figures = Results({}, (), comparison=replace(results.comparison, ratios=(ratio,))).as_json()
    assert (figures["ratios"][0]["ratio"], figures["ratios"][0]["high"]) == (None, None)


def test_csv_has_a_line_per_request(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    write_csv(sweep(), path)
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert tuple(lines[0]) == COLUMNS
    assert len(lines) == 5 + 5 + 1
    assert (lines[0]["model"], lines[0]["ttft"], lines[0]["tpot"], lines[0]["tokens"]) == ("a", "0.1", "0.02", "3")
    assert lines[1]["model"] == EVIL
    assert (lines[3]["kind"], lines[3]["ttft"], lines[4]["cancelled"]) == ("http 503", "", "1")


class Page(HTMLParser):
    """The tags of a page, and its links."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "action")]


@pytest.mark.parametrize("make", ALL)
def test_a_page_of_its_own(make, tmp_path: Path) -> None:
    path = tmp_path / "x.html"
    write_html(make(), path)
    text = path.read_text()
    page = Page(text)
    assert {"table", "svg", "style"} <= page.tags
    assert "script" not in page.tags
    assert all(link.startswith("#") for link in page.links)
    assert not re.search(r"@import|url\((?!#)", text)
    assert "default-src 'none'" in text


@pytest.mark.parametrize("make", ALL)
def test_plots(make, tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    write_png(make(), path)
    assert path.read_bytes().startswith(b"\x89PNG")
    titles = [title for title, _ in svg_plots(make())]
    assert len(titles) == {"sweep": 4, "saturation": 2, "comparison": 5}[make.__name__]


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    check_writable((None, Path("-"), tmp_path / "new.json"))
    assert not (tmp_path / "new.json").exists()
    for place in (tmp_path, tmp_path / "missing" / "x.json"):
        with pytest.raises(InvalidArgument, match="can't be written"):
            check_writable((place,))
        for write in (write_json, write_csv, write_png):
            with pytest.raises(InvalidArgument, match="can't be written"):
                write(sweep(), place)


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    check_plots()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InvalidArgument, match=r"preft-serve\[plots\]"):
        check_plots()
