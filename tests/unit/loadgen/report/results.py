"""Results of invented runs, with names that would do harm in a page or a formula."""

from __future__ import annotations

from preft_loadgen.measure.churn import Change
from preft_loadgen.measure.compare import Comparison, crossovers, ratio_of
from preft_loadgen.measure.record import Record, Run
from preft_loadgen.measure.saturation import Saturation
from preft_loadgen.measure.sweep import Measured
from preft_loadgen.report.files import Results
from preft_loadgen.report.metrics import Checked, summarize
from preft_loadgen.report.slo import Slo

EVIL = "<script>alert(1)</script> $\\frac$ \x07"
GOOD = (
    Record("a", 0.0, 1.0, ttft=0.1, gaps=(0.01, 0.03), counts=(1, 1), tokens=3, prompt_tokens=5),
    Record(EVIL, 0.0, 2.0, ttft=0.3, gaps=(0.02,), counts=(4,), tokens=5, prompt_tokens=7),
    Record("a", 0.2, 0.7, ttft=0.4, gaps=(0.3,), counts=(1,), tokens=2, prompt_tokens=1, delay=0.01),
)
FAILED = Record("a", 0.5, 0.1, error=f"503: nobody there {EVIL}", kind="http 503")
CANCELLED = Record("a", 0.5, 0.1, ttft=0.05, cancelled=True)
RUN = Run((*GOOD, FAILED, CANCELLED), seconds=2.0, planned=10.0)
NONE = Run((FAILED,), seconds=1.0)


def measured(run: Run, adapters: int, target: str = "", number: int = 0, load: str = "") -> Measured:
    checked = Checked(5, 3, 1, 1, {EVIL: 1})
    summary = summarize(run, adapters, slo=Slo(ttft=0.35), checked=checked, target=target, round=number, load=load)
    return Measured(summary, run, (Change("add", EVIL, "/x", 0.5, 0.1, "400"),))


def sweep() -> Results:
    return Results({"url": EVIL}, (measured(RUN, 0), measured(RUN, 2), measured(NONE, 8)))


def saturation() -> Results:
    runs = tuple(measured(RUN, 2, load=load) for load in ("one at a time", "3.5/s", "all at once"))
    return Results({}, runs, (Saturation(2, runs, 3.5), Saturation(0, runs, None)))


def comparison() -> Results:
    slow = Run(GOOD[:1], 2.0)
    runs = tuple(
        measured(run, count, target, number)
        for count in (0, 2)
        for number in range(2)
        for target, run in ((EVIL, RUN if count else slow), ("$x$", slow if count else RUN))
    )
    summaries = [one.summary for one in runs]
    ratios = tuple(ratio_of(summaries, "$x$", EVIL, count) for count in (0, 2))
    return Results({}, runs, comparison=Comparison(runs, ratios, tuple(crossovers(ratios))))
