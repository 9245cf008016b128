"""Lengths in tokens, or in turns: fixed, from a range, or lognormal."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Protocol

from preft_loadgen.errors import InvalidArgument

MOST = 1 << 24


class Length(Protocol):
    """A distribution of whole numbers from 1 up."""

    def draw(self, source: random.Random) -> int: ...


@dataclass(frozen=True, slots=True)
class Lengths:
    """Drawn evenly from `low` to `high`, both included."""

    low: int
    high: int

    def __post_init__(self) -> None:
        if not 1 <= self.low <= self.high <= MOST:
            raise InvalidArgument(f"lengths go from 1 up, the lower one first, not {self.low}-{self.high}")

    def draw(self, source: random.Random) -> int:
        return source.randint(self.low, self.high)

    def __str__(self) -> str:
        return f"{self.low}" if self.low == self.high else f"{self.low}-{self.high}"


@dataclass(frozen=True, slots=True)
class LogNormal:
    """Lognormal, with this `mean` and standard `deviation`, rounded, at least 1. Most real lengths look like this."""

    mean: float
    deviation: float

    def __post_init__(self) -> None:
        if not (1 <= self.mean <= MOST and 0 < self.deviation <= MOST):
            raise InvalidArgument(f"a lognormal length has a mean from 1 up and a deviation above 0, not {self}")

    def draw(self, source: random.Random) -> int:
        variance = math.log(1 + (self.deviation / self.mean) ** 2)
        return min(MOST, max(1, round(source.lognormvariate(math.log(self.mean) - variance / 2, variance**0.5))))

    def __str__(self) -> str:
        return f"lognormal:{self.mean:g},{self.deviation:g}"


def parse_length(text: str) -> Length:
    """From `128`, `64-256` or `lognormal:MEAN,DEVIATION`. Raises InvalidArgument."""
    kind, colon, rest = text.partition(":")
    try:
        if colon and kind == "lognormal":
            mean, deviation = map(float, rest.split(","))
            return LogNormal(mean, deviation)
        low, dash, high = text.partition("-")
        return Lengths(int(low), int(high if dash else low))
    except ValueError:
        raise InvalidArgument(f"a length looks like 128, 64-256 or lognormal:200,150, not {text!r}") from None
