"""Several servers under the same load, in turns: speeds by adapter count, and ratios of the rounds with their range.

A round measures all targets directly after each other, in an order that changes; a slow phase of the machine hits all
targets of a round. So the ratio within a round says more than the ratio of two averages.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from preft_loadgen.errors import InvalidArgument
from preft_loadgen.measure.sweep import Load, Measured, Population, calm_answers, measure
from preft_loadgen.report.metrics import Summary
from preft_loadgen.transport.server import Server

# fmt: off
STUDENT_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
             2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)
# fmt: on
"""The 97.5% quantiles of Student's t distribution with 1, 2, ... 30 degrees of freedom."""


@dataclass(frozen=True, slots=True)
class Target:
    """A server with its name in the comparison. With `rounds` it is measured in the first rounds alone."""

    name: str
    server: Server
    models: Population
    rounds: int | None = None


@dataclass(frozen=True, slots=True)
class Ratio:
    """Speed of `target` by that of the reference at one adapter count: geometric mean of the rounds' ratios.

    `low` to `high` is the 95% confidence range (Student's t over the logarithms); both None with a single round.
    """

    target: str
    reference: str
    adapters: int
    ratio: float
    low: float | None
    high: float | None
    rounds: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Crossover:
    """Between the adapter counts `above` and `below`, `target` begins or ceases to be faster than the reference.

    `adapters` is the place between them where the ratio would be 1, interpolated on the logarithms of counts + 1. It is
    `certain` if the confidence ranges at both counts exclude 1.
    """

    target: str
    reference: str
    adapters: float
    begins: bool
    above: int
    below: int
    certain: bool


@dataclass(frozen=True, slots=True)
class Comparison:
    """All runs, and what follows from them. `ratios` are in the order of targets, then of counts."""

    measured: tuple[Measured, ...]
    ratios: tuple[Ratio, ...]
    crossovers: tuple[Crossover, ...]

    @property
    def summaries(self) -> tuple[Summary, ...]:
        return tuple(one.summary for one in self.measured)


async def compare(
    targets: Sequence[Target], load: Load, counts: Sequence[int], rounds: int, *, force_progress: bool = False
) -> Comparison:
    """Measures all targets at all counts, `rounds` times; the first target is the reference.

    Raises InvalidArgument if a target has too few adapters.
    """
    if not 1 <= rounds <= 1000:
        raise InvalidArgument(f"a comparison has from 1 to 1000 rounds, not {rounds}")
    if len(targets) < 2 or len({target.name for target in targets}) < len(targets):
        raise InvalidArgument("a comparison needs at least two targets, with different names")
    for target in targets:
        try:
            target.models.models(max(counts))
            if 0 in counts:
                target.models.models(0)
        except InvalidArgument as error:
            raise InvalidArgument(f"{target.name}: {error}") from None
    answers = [
        await calm_answers(target.server, load, counts, target.models, force_progress=force_progress)
        for target in targets
    ]
    measured: list[Measured] = []
    for place, count in enumerate(counts):
        for number in range(rounds):
            for turn in range(len(targets)):
                chosen = (turn + number) % len(targets)
                target = targets[chosen]
                if target.rounds is not None and number >= target.rounds:
                    continue
                measured.append(
                    await measure(
                        target.server,
                        load,
                        count,
                        target.models,
                        place * rounds + number,
                        answers[chosen],
                        target=target.name,
                        force_progress=force_progress,
                        round=number,
                    )
                )
    names = [target.name for target in targets]
    ratios = tuple(
        ratio_of([one.summary for one in measured], name, names[0], count) for name in names[1:] for count in counts
    )
    return Comparison(tuple(measured), ratios, tuple(crossovers(ratios)))


def ratio_of(summaries: Sequence[Summary], target: str, reference: str, count: int) -> Ratio:
    """The ratio of output tokens per second, over the rounds in which both were measured and answered something."""
    speeds = {(one.target, one.round): one.tokens_per_s for one in summaries if one.adapters == count}
    rounds = sorted(number for name, number in speeds if name == target and (reference, number) in speeds)
    pairs = [(speeds[target, number], speeds[reference, number]) for number in rounds]
    ratios = tuple(own / other for own, other in pairs if own > 0 and other > 0)
    if not ratios:
        return Ratio(target, reference, count, math.nan, None, None, ())
    logs = [math.log(ratio) for ratio in ratios]
    mean = statistics.fmean(logs)
    if len(logs) == 1:
        return Ratio(target, reference, count, ratios[0], None, None, ratios)
    half = STUDENT_T[min(len(logs) - 2, len(STUDENT_T) - 1)] * statistics.stdev(logs) / math.sqrt(len(logs))
    return Ratio(target, reference, count, math.exp(mean), _exp(mean - half), _exp(mean + half), ratios)


def _exp(value: float) -> float:
    return math.exp(min(value, 700.0))  # two rounds can give any range


def _is_certain(ratio: Ratio) -> bool:
    return ratio.low is not None and ratio.high is not None and not ratio.low <= 1 <= ratio.high


def crossovers(ratios: Sequence[Ratio]) -> list[Crossover]:
    """Where the ratio passes 1 between neighbouring adapter counts."""
    found = []
    for name in dict.fromkeys(ratio.target for ratio in ratios):
        own = sorted((one for one in ratios if one.target == name and one.ratio > 0), key=lambda one: one.adapters)
        for left, right in pairwise(own):
            if (left.ratio < 1) != (right.ratio < 1):
                below, above = math.log(left.ratio), math.log(right.ratio)
                start, end = math.log1p(left.adapters), math.log1p(right.adapters)
                where = math.expm1(start + (end - start) * below / (below - above))
                found.append(
                    Crossover(
                        name,
                        left.reference,
                        where,
                        begins=right.ratio >= 1,
                        above=left.adapters,
                        below=right.adapters,
                        certain=_is_certain(left) and _is_certain(right),
                    )
                )
    return found
