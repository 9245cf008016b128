"""Finds the request rate that a server sustains: one request at a time, all at once, then rates between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from preft_loadgen.errors import InvalidArgument
from preft_loadgen.measure.record import Run
from preft_loadgen.measure.sweep import ClosedLoop, Load, Measured, Population, calm_answers, measure
from preft_loadgen.measure.verify import Answers
from preft_loadgen.report.metrics import percentile
from preft_loadgen.traffic.arrivals import OpenLoop
from preft_loadgen.transport.server import Server

RATES = 6
BEYOND = 1.1  # the highest rate, by the throughput of all requests at once
GROWTH, ROOM_SECONDS = 2.0, 0.02  # by how much times to first token may grow in a run that keeps up


@dataclass(frozen=True, slots=True)
class Saturation:
    """The runs at one adapter count, from slow to fast, and the highest rate (requests per second) that was sustained.

    `sustained` is None if no rate was.
    """

    adapters: int
    measured: tuple[Measured, ...]
    sustained: float | None


async def saturate(
    server: Server,
    load: Load,
    counts: Sequence[int],
    models: Population,
    *,
    burstiness: float | None = 1.0,
    force_progress: bool = False,
) -> list[Saturation]:
    """One search per adapter count. Ignores the load's own pace.

    Raises InvalidArgument if there are too few adapters, or if no request is answered.
    """
    models.models(max(counts))
    answers = await calm_answers(server, load, counts, models, force_progress=force_progress)
    found = []
    for place, count in enumerate(counts):
        search = _Search(server, load, count, models, answers, place * (RATES + 2), force_progress)
        found.append(await search.run(burstiness))
    return found


@dataclass(frozen=True, slots=True)
class _Search:
    """The search at one adapter count. Its runs are numbered from `first` on."""

    server: Server
    load: Load
    count: int
    models: Population
    answers: Answers | None
    first: int
    force_progress: bool

    async def run(self, burstiness: float | None) -> Saturation:
        alone = await self._at(ClosedLoop(1), "one at a time", 0, max(1, self.load.requests // 8))
        crowd = await self._at(ClosedLoop(self.load.requests), "all at once", 1, self.load.requests)
        low, high = alone.summary.requests_per_s, BEYOND * crowd.summary.requests_per_s
        if not low or not high:
            error = alone.summary.first_error or crowd.summary.first_error
            raise InvalidArgument(f"no rate can be found, because no request was answered: {error}")
        between = []
        for step in range(RATES):
            rate = low + (high - low) * (step + 1) / RATES
            pace = OpenLoop(rate, burstiness)
            between.append(await self._at(pace, f"{rate:.3g}/s", step + 2, self.load.requests))
        sustained = [one.run.planned or 0.0 for one in between if keeps_up(one)]
        return Saturation(self.count, (alone, *between, crowd), max(sustained, default=None))

    async def _at(self, pace: ClosedLoop | OpenLoop, label: str, number: int, requests: int) -> Measured:
        return await measure(
            self.server,
            replace(self.load, pace=pace, requests=requests),
            self.count,
            self.models,
            self.first + number,
            self.answers,
            label=label,
            force_progress=self.force_progress,
        )


def keeps_up(measured: Measured) -> bool:
    """Whether queues didn't grow: no failures, and times to first token as short at the end as at the start.

    With an SLO, 90% of the requests must keep it too.
    """
    goodput = measured.summary.goodput
    if measured.summary.errors or (goodput is not None and goodput.share < 0.9):
        return False
    early, late = _thirds(measured.run)
    return late <= GROWTH * early + ROOM_SECONDS


def _thirds(run: Run) -> tuple[float, float]:
    """The median time to first token, in seconds, of the first and of the last third of the requests."""
    ttfts = [record.ttft for record in sorted(run.records, key=lambda one: one.started) if record.answered]
    third = max(1, len(ttfts) // 3)
    return percentile(ttfts[:third], 50), percentile(ttfts[-third:], 50)
