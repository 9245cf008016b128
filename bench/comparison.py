"""Speeds measured on several sides in turns, and their table."""

from __future__ import annotations

import statistics
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from preft_loadgen.table import table

Value = TypeVar("Value")
Side = Callable[[int], Awaitable[Value]]
"""Measures one side once: from the round number to a speed, or several. Equal rounds have equal work."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Speeds (more is better) of both sides, one per round. A round measures both sides directly after each other.

    `bar` is the target ratio; `how` describes the measurement.
    """

    what: str
    unit: str
    ours: tuple[float, ...]
    reference: tuple[float, ...]
    bar: float
    how: str

    @property
    def ratios(self) -> tuple[float, ...]:
        """PreFT's speed divided by the reference's, per round."""
        return tuple(ours / reference for ours, reference in zip(self.ours, self.reference, strict=True))

    @property
    def ratio(self) -> float:
        """The median of the rounds' ratios: a temporary slowdown of the machine hits both sides of a round."""
        return statistics.median(self.ratios)

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "ratios": self.ratios, "ratio": self.ratio}

    @property
    def reached(self) -> bool:
        """Whether the ratio is at least the bar."""
        return self.ratio >= self.bar


async def take_turns(sides: Sequence[Side[Value]], rounds: int, step: Callable[[], None]) -> list[tuple[Value, ...]]:
    """Each side's speeds over the rounds. One side works at a time, in changing order; round -1 warms up.

    Calls `step` `turns(len(sides), rounds)` times.
    """
    speeds: list[list[Value]] = [[] for _ in sides]
    for number in range(-1, rounds):
        for turn in range(len(sides)):
            place = (turn + number) % len(sides)
            speeds[place].append(await sides[place](number))
            step()
    return [tuple(column[1:]) for column in speeds]


def turns(sides: int, rounds: int) -> int:
    """The number of measurements that `take_turns` makes."""
    return sides * (rounds + 1)


def comparison_table(comparisons: Sequence[Comparison]) -> str:
    """One line per comparison: medians of both sides, median and range of the ratio, the bar."""
    head = ["", "ours", "reference", "", "ratio", "from - to", "bar", ""]
    rows = [
        [
            one.what,
            f"{statistics.median(one.ours):.4g}",
            f"{statistics.median(one.reference):.4g}",
            one.unit,
            f"{one.ratio:.2f}",
            f"{min(one.ratios):.2f} - {max(one.ratios):.2f}",
            f"{one.bar:.2f}",
            "ok" if one.reached else "below",
        ]
        for one in comparisons
    ]
    return table([head, *rows], right={1, 2, 4, 5, 6})


def steady_rate(arrivals: Sequence[Sequence[float]]) -> float:
    """Tokens per second while all requests decode. `arrivals` holds each request's arrival times of decoded tokens.

    The measured time lasts from the last request's first decoded token to the first request's last decoded token.
    Raises ValueError if the requests never ran all at once.
    """
    begin = max(times[0] for times in arrivals)
    end = min(times[-1] for times in arrivals)
    if end <= begin:
        raise ValueError("the requests were never all running at once")
    return sum(begin < time <= end for times in arrivals for time in times) / (end - begin)
