"""Which model each request names. Every choice is a pure function of the models, the count and the random source."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from preft_loadgen.errors import InvalidArgument


class Choice(Protocol):
    """Draws the models of `count` requests, in sending order."""

    def draw(self, models: Sequence[str], count: int, source: random.Random) -> list[str]: ...


@dataclass(frozen=True, slots=True)
class RoundRobin:
    """One model after the other, in their order."""

    def draw(self, models: Sequence[str], count: int, source: random.Random) -> list[str]:
        return list(itertools.islice(itertools.cycle(models), count))


@dataclass(frozen=True, slots=True)
class Uniform:
    """Equally often (within one), in random order."""

    def draw(self, models: Sequence[str], count: int, source: random.Random) -> list[str]:
        drawn = RoundRobin().draw(models, count, source)
        source.shuffle(drawn)
        return drawn


@dataclass(frozen=True, slots=True)
class Weights:
    """The k-th model in proportion to the k-th weight. Models beyond the weights share the last weight."""

    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.weights or not all(0 < weight < float("inf") for weight in self.weights):
            raise InvalidArgument("weights are numbers above 0")

    def draw(self, models: Sequence[str], count: int, source: random.Random) -> list[str]:
        own = [self.weights[min(number, len(self.weights) - 1)] for number in range(len(models))]
        return source.choices(models, own, k=count)


@dataclass(frozen=True, slots=True)
class Zipf:
    """The k-th model in proportion to k to the power of -`exponent`.

    With `drift`, popularity moves: after every `drift` requests the least popular model becomes the most popular one,
    and all others fall by one rank.
    """

    exponent: float = 1.0
    drift: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.exponent <= 20 or (self.drift is not None and self.drift < 1):
            raise InvalidArgument(
                "zipf needs an exponent from 0 to 20, and a drift needs a number of requests from 1 up"
            )

    def draw(self, models: Sequence[str], count: int, source: random.Random) -> list[str]:
        weights = [(rank + 1) ** -self.exponent for rank in range(len(models))]
        ranks = source.choices(range(len(models)), weights, k=count)
        if self.drift is None:
            return [models[rank] for rank in ranks]
        return [models[(rank - number // self.drift) % len(models)] for number, rank in enumerate(ranks)]


def parse_choice(text: str) -> Choice:
    """From `uniform`, `round-robin`, `weights:5,3,1`, `zipf:A` or `drift:A,REQUESTS`. Raises InvalidArgument."""
    kind, _, rest = text.partition(":")
    try:
        match kind:
            case "uniform" | "round-robin" if text == kind:
                return Uniform() if kind == "uniform" else RoundRobin()
            case "weights":
                return Weights(tuple(map(float, rest.split(","))))
            case "zipf":
                return Zipf(float(rest) if rest else 1.0)
            case "drift":
                exponent, drift = rest.split(",")
                return Zipf(float(exponent), int(drift))
    except ValueError:
        pass
    raise InvalidArgument(f"a choice is uniform, round-robin, weights:5,3,1, zipf:1.1 or drift:1.1,100, not {text!r}")
