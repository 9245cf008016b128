"""Figures of a run: speeds, latencies, errors. Field names are those of the JSON report; times are in seconds."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from preft_loadgen.measure.record import Record, Run
from preft_loadgen.report.slo import Slo


@dataclass(frozen=True, slots=True)
class Spread:
    """A latency's mean, percentiles and maximum, in seconds."""

    mean: float
    p50: float
    p90: float
    p99: float
    max: float


@dataclass(frozen=True, slots=True)
class Goodput:
    """Requests that kept the SLO: the share (0 to 1) of all that weren't cancelled, and how many per second."""

    slo: str
    share: float
    requests_per_s: float


@dataclass(frozen=True, slots=True)
class Rate:
    """Requests per second of an open loop: planned, and really sent. `delay`: how late requests were sent."""

    planned: float
    achieved: float
    delay: Spread


@dataclass(frozen=True, slots=True)
class Cold:
    """The part of all time to first token that first uses of adapters added.

    No reply says whether an adapter had to be loaded. So this compares each adapter's first use in the run with the
    median of its later uses. `share` is the sum of the differences, by the sum of all times to first token.
    """

    adapters: int
    ttft_first: float
    ttft_later: float
    share: float


@dataclass(frozen=True, slots=True)
class OfModel:
    """One adapter's part of a run. Latencies are None without an answer."""

    model: str
    requests: int
    errors: int
    tokens: int
    tokens_per_s: float
    ttft: Spread | None
    itl: Spread | None
    e2e: Spread | None


@dataclass(frozen=True, slots=True)
class Checked:
    """Answers compared with the calm pass. `wrong_by` says whose answers the wrong ones were."""

    answers: int
    right: int
    wrong: int
    unclear: int
    wrong_by: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Summary:
    """One run. Speeds and latencies count whole answers alone; latencies are None where there is none.

    `tokens_per_s` counts output tokens, `total_tokens_per_s` prompt tokens too.
    """

    adapters: int
    requests: int
    answers: int
    cancelled: int
    errors: int
    errors_by_kind: dict[str, int]
    first_error: str | None
    seconds: float
    tokens: int
    prompt_tokens: int
    tokens_per_s: float
    total_tokens_per_s: float
    requests_per_s: float
    ttft: Spread | None
    tpot: Spread | None
    itl: Spread | None
    gap: Spread | None
    e2e: Spread | None
    goodput: Goodput | None
    rate: Rate | None
    cold: Cold | None
    by_adapter: tuple[OfModel, ...]
    verify: Checked | None = None
    target: str = ""
    round: int = 0
    load: str = ""


def summarize(
    run: Run,
    adapters: int,
    *,
    slo: Slo | None = None,
    checked: Checked | None = None,
    target: str = "",
    load: str = "",
    round: int = 0,
) -> Summary:
    """The figures of `run`, which used `adapters` adapters."""
    good = [record for record in run.records if record.answered]
    failed = [record for record in run.records if record.error is not None]
    tokens, prompt = sum(record.tokens for record in good), sum(record.prompt_tokens for record in good)
    seconds = max(run.seconds, 1e-9)
    return Summary(
        adapters=adapters,
        requests=len(run.records),
        answers=len(good),
        cancelled=sum(record.cancelled for record in run.records),
        errors=len(failed),
        errors_by_kind=dict(Counter(record.kind for record in failed).most_common()),
        first_error=failed[0].error if failed else None,
        seconds=run.seconds,
        tokens=tokens,
        prompt_tokens=prompt,
        tokens_per_s=tokens / seconds,
        total_tokens_per_s=(tokens + prompt) / seconds,
        requests_per_s=len(good) / seconds,
        ttft=spread(record.ttft for record in good),
        tpot=spread(tpot for record in good if (tpot := record.tpot) is not None),
        itl=_itl(good),
        gap=spread(gap for record in good for gap in record.gaps),
        e2e=spread(record.seconds for record in good),
        goodput=None if slo is None else _goodput(run, slo, seconds),
        rate=_rate(run),
        cold=_cold(run) if adapters else None,
        by_adapter=_by_model(run, seconds) if adapters else (),
        verify=checked,
        target=target,
        load=load,
        round=round,
    )


def spread(values: Iterable[float]) -> Spread | None:
    """Of values in seconds, percentiles linearly interpolated; None without values."""
    return _spread(np.fromiter(values, np.float64))


def percentile(values: Sequence[float], percent: float) -> float:
    """The value that `percent` % of `values` don't exceed, linearly interpolated. 0 without values."""
    return float(np.percentile(values, percent)) if len(values) else 0.0


def _spread(values: np.ndarray) -> Spread | None:
    if not values.size:
        return None
    p50, p90, p99 = map(float, np.percentile(values, (50, 90, 99)))
    return Spread(float(values.mean()), p50, p90, p99, float(values.max()))


def _itl(records: Sequence[Record]) -> Spread | None:
    """Each token's latency; see `record`."""
    gaps = np.fromiter((gap for record in records for gap in record.gaps), np.float64)
    counts = np.fromiter((count for record in records for count in record.counts), np.int64)
    some = counts > 0
    return _spread(np.repeat(gaps[some] / counts[some], counts[some]))


def _goodput(run: Run, slo: Slo, seconds: float) -> Goodput:
    counted = [record for record in run.records if not record.cancelled]
    kept = sum(map(slo.kept, counted))
    return Goodput(str(slo), kept / len(counted) if counted else 0.0, kept / seconds)


def _rate(run: Run) -> Rate | None:
    first_turns = [record for record in run.records if record.turn == 0]
    delay = spread(record.delay for record in first_turns)
    if run.planned is None or delay is None:
        return None
    last = max(record.started + record.delay for record in first_turns)
    return Rate(run.planned, len(first_turns) / max(last, 1e-9), delay)


def _cold(run: Run) -> Cold | None:
    uses: dict[str, list[Record]] = defaultdict(list)
    for record in sorted(run.records, key=lambda one: one.started):
        if record.answered:
            uses[record.model].append(record)
    firsts, laters, extra = [], [], 0.0
    for records in uses.values():
        if len(records) > 1:
            first, later = records[0].ttft, percentile([record.ttft for record in records[1:]], 50)
            firsts.append(first)
            laters.append(later)
            extra += max(0.0, first - later)
    total = sum(record.ttft for records in uses.values() for record in records)
    if not firsts or total <= 0:
        return None
    return Cold(len(firsts), percentile(firsts, 50), percentile(laters, 50), extra / total)


def _by_model(run: Run, seconds: float) -> tuple[OfModel, ...]:
    of_model: dict[str, list[Record]] = defaultdict(list)
    for record in run.records:
        of_model[record.model].append(record)
    found = []
    for model, records in sorted(of_model.items()):
        good = [record for record in records if record.answered]
        tokens = sum(record.tokens for record in good)
        found.append(
            OfModel(
                model=model,
                requests=len(records),
                errors=sum(record.error is not None for record in records),
                tokens=tokens,
                tokens_per_s=tokens / seconds,
                ttft=spread(record.ttft for record in good),
                itl=_itl(good),
                e2e=spread(record.seconds for record in good),
            )
        )
    return tuple(found)
