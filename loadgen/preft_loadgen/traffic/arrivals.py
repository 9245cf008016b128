"""Arrival times of independent requests, in seconds after the start.

Sources: a Poisson process has exponential intervals; gamma intervals with shape b have the same mean and the squared
coefficient of variation 1/b, so b < 1 means bursts.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass

from preft_loadgen.errors import InvalidArgument

MOST_PER_SECOND = 1e6


@dataclass(frozen=True, slots=True)
class OpenLoop:
    """Requests come at their own times, whatever is in flight, with `rate` requests per second.

    `burstiness` is the gamma shape of the intervals: 1 is Poisson, less is more bursty; None: constant intervals.
    With `final_rate` the rate grows or falls evenly from `rate` to it, from the first to the last request.
    """

    rate: float
    burstiness: float | None = 1.0
    final_rate: float | None = None

    def __post_init__(self) -> None:
        for rate in (self.rate, self.rate if self.final_rate is None else self.final_rate):
            if not 0 < rate <= MOST_PER_SECOND:
                raise InvalidArgument(f"the rate must be more than 0 requests per second, not {rate:g}")
        if self.burstiness is not None and not 0.001 <= self.burstiness <= 1000:
            raise InvalidArgument(f"the burstiness must be between 0.001 and 1000, not {self.burstiness:g}")

    def times(self, count: int, seed: int = 0) -> list[float]:
        """Ascending times of `count` requests. Equal seeds give equal times."""
        source = random.Random(f"arrivals {seed}")
        shape = self.burstiness

        def interval(number: int) -> float:
            mean = 1 / self._rate_of(number, count)
            return mean if shape is None else source.gammavariate(shape, mean / shape)

        return list(itertools.accumulate(interval(number) for number in range(count)))

    def _rate_of(self, number: int, count: int) -> float:
        if self.final_rate is None:
            return self.rate
        return self.rate + (self.final_rate - self.rate) * number / max(1, count - 1)


def parse_open_loop(rate: str, arrivals: str = "poisson") -> OpenLoop:
    """From a rate (`8`, or `1-20` for a ramp) and a pattern: `constant`, `poisson`, or `gamma:B`.

    Raises InvalidArgument.
    """
    low, dash, high = rate.partition("-")
    try:
        first, final = float(low), float(high) if dash else None
    except ValueError:
        raise InvalidArgument(f"a rate looks like 8, or 1-20 for a ramp, not {rate!r}") from None
    return OpenLoop(first, _burstiness(arrivals), final)


def _burstiness(text: str) -> float | None:
    kind, colon, shape = text.partition(":")
    if not colon and kind in ("constant", "poisson"):
        return None if kind == "constant" else 1.0
    try:
        if kind == "gamma":
            return float(shape)
    except ValueError:
        pass
    raise InvalidArgument(f"arrivals are constant, poisson or gamma:B, as in gamma:0.5, not {text!r}")
