"""Tables and sentences."""

from __future__ import annotations

from preft_loadgen.report.metrics import summarize
from preft_loadgen.report.tables import findings, notes, summary_table
from unit.loadgen.report.results import NONE, RUN, comparison, saturation, sweep


def test_the_table_has_a_line_per_run() -> None:
    lines = summary_table([summarize(RUN, 0), summarize(RUN, 8), summarize(NONE, 9)]).splitlines()
    assert lines[0].split()[:2] == ["adapters", "tokens/s"]
    assert lines[1].split() == ["base", "5", "1.5", "300.0", "398.0", "5.0", "283.8", "1"]
    assert lines[2].split()[0] == "8"
    assert lines[3].split() == ["9", "0", "0.0", "-", "-", "-", "-", "1"]


def test_columns_appear_where_they_are_needed() -> None:
    head = summary_table([one.summary for one in sweep().measured]).splitlines()[0]
    assert "good" in head
    assert "wrong adapter" in head
    assert "target" not in head
    assert "load" in summary_table([one.summary for one in saturation().measured]).splitlines()[0]
    assert "target" in summary_table([one.summary for one in comparison().measured]).splitlines()[0]


def test_sentences_about_what_went_wrong() -> None:
    found = notes([one.summary for one in sweep().measured])
    assert any("1 of 5 requests failed (1 x http 503); the first: 503: nobody there" in line for line in found)
    assert any("1 answers are another model's" in line and "1 are nobody's, of 5" in line for line in found)
    assert notes([summarize(RUN, 1)])[0].startswith("1 adapter: 1 of 5")
    assert not any("\x07" in line for line in found)
    late = summarize(type(RUN)(RUN.records, 2.0, planned=30.0), 1)
    assert any("10.0 requests/s were sent where 30.0 were planned" in line for line in notes([late]))


def test_sentences_about_searches_and_comparisons() -> None:
    assert findings(saturation()) == [
        "2 adapters: 3.5 requests/s are sustained",
        "base model: no measured rate is sustained",
    ]
    found = findings(comparison())
    assert found[0].startswith("base model: $x$ has 3.333 of the tokens/s of")
    assert found[1].startswith("2 adapters: $x$ has 0.300")
    assert "falls behind" in found[2]
    assert findings(sweep()) == []
