"""Workloads: requests over adapters, with random lengths and popularity, equal for equal seeds. Sends nothing.

Prompts are random token ids, so a workload needs no tokenizer, and no two prompts share a cacheable prefix.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass
from enum import StrEnum

from preft_loadgen.errors import InvalidArgument


class Popularity(StrEnum):
    """How requests spread over models. UNIFORM: equally (within one); ZIPF: the k-th in proportion to 1/k."""

    UNIFORM = "uniform"
    ZIPF = "zipf"


@dataclass(frozen=True, slots=True)
class Lengths:
    """A length in tokens, drawn evenly from `low` to `high`, both included."""

    low: int
    high: int

    def __post_init__(self) -> None:
        if not 1 <= self.low <= self.high:
            raise InvalidArgument(f"lengths go from 1 up, the lower one first, not {self.low}-{self.high}")

    @classmethod
    def parse(cls, text: str) -> Lengths:
        """From `128` or `64-256`. Raises InvalidArgument."""
        low, dash, high = text.partition("-")
        try:
            return cls(int(low), int(high if dash else low))
        except ValueError:
            raise InvalidArgument(f"a length looks like 128 or 64-256, not {text!r}") from None

    def draw(self, source: random.Random) -> int:
        return source.randint(self.low, self.high)


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt for `model`, with exactly `output_tokens` tokens of output."""

    model: str
    prompt: tuple[int, ...]
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Workload:
    """A set of requests. Token ids are drawn from `first_id` up to, not including, `vocabulary`."""

    models: tuple[str, ...]
    requests: int
    prompt: Lengths
    output: Lengths
    popularity: Popularity = Popularity.UNIFORM
    seed: int = 0
    vocabulary: int = 256
    first_id: int = 3  # lower ids are special tokens in most vocabularies

    def __post_init__(self) -> None:
        if not self.models or self.requests < 1 or not 0 <= self.first_id < self.vocabulary:
            raise InvalidArgument("a workload needs a model, a request and a vocabulary to draw from")

    def make(self) -> list[Request]:
        """The requests, in sending order."""
        source = random.Random(f"requests {self.seed}")
        ids = range(self.first_id, self.vocabulary)
        return [
            Request(model, tuple(source.choices(ids, k=self.prompt.draw(source))), self.output.draw(source))
            for model in self._models(source)
        ]

    def _models(self, source: random.Random) -> list[str]:
        if self.popularity is Popularity.ZIPF:
            weights = [1 / (rank + 1) for rank in range(len(self.models))]
            return source.choices(self.models, weights, k=self.requests)
        drawn = list(itertools.islice(itertools.cycle(self.models), self.requests))
        source.shuffle(drawn)
        return drawn


def poisson_arrivals(rate: float, count: int, seed: int = 0) -> list[float]:
    """Arrival times of `count` independent requests in seconds after the start, with `rate` per second on average."""
    if not rate > 0:
        raise InvalidArgument(f"the rate must be more than 0 requests per second, not {rate:g}")
    source = random.Random(f"arrivals {seed}")
    return list(itertools.accumulate(source.expovariate(rate) for _ in range(count)))
