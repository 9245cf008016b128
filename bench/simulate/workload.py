"""The requests of a run: when they come, for which adapter, and how long they are. Equal seeds give equal requests."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bench.simulate.scenario import Lengths, Scenario
from preft.core.request import AdapterRef


@dataclass(frozen=True, slots=True)
class Arrival:
    """`adapter` is a number, or -1 for the base model. `rank` is the adapter's place by popularity, 0 the first."""

    at: float
    adapter: int
    rank: int
    prompt: int
    output: int


class Workload:
    """Open-loop Poisson arrivals."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self._random = np.random.default_rng(scenario.seed)
        weights = np.arange(1, scenario.adapters + 1, dtype=float) ** -scenario.zipf
        self._shares = weights / weights.sum()
        self.by_rank = self._random.permutation(scenario.adapters)  # adapter numbers, most popular first
        engine = scenario.engine
        mean = float(_draw(np.random.default_rng(0), scenario.prompts, 100_000).mean())
        self.rate = scenario.load * scenario.prefill / engine.prompt_seconds(mean)
        """Requests a second."""

    def arrivals(self) -> Iterator[Arrival]:
        """All requests, in order of time."""
        scenario, start = self.scenario, 0.0
        while start < scenario.end:
            seconds = min(scenario.drift_seconds, scenario.end - start)
            yield from self._stretch(start, seconds)
            self._drift()
            start += seconds

    def _stretch(self, start: float, seconds: float) -> Iterator[Arrival]:
        """Requests of a time without drift."""
        random, scenario = self._random, self.scenario
        number = int(random.poisson(self.rate * seconds))
        times = np.sort(random.uniform(start, start + seconds, number))
        ranks = np.searchsorted(np.cumsum(self._shares), random.uniform(0, 1, number)).clip(0, scenario.adapters - 1)
        for burst in scenario.bursts:
            extra = float(self._shares[min(burst.rank, scenario.adapters - 1)]) * burst.factor
            hit = random.uniform(0, 1, number) < extra / (1 + extra)
            ranks[hit & (times >= burst.start) & (times < burst.start + burst.seconds)] = burst.rank
        base = random.uniform(0, 1, number) < scenario.base_share
        adapters = np.where(base, -1, self.by_rank[ranks])
        prompts = _draw(random, scenario.prompts, number)
        outputs = _draw(random, scenario.outputs, number)
        for values in zip(times, adapters, ranks, prompts, outputs, strict=True):
            at, adapter, rank, prompt, output = values
            yield Arrival(float(at), int(adapter), int(rank), int(prompt), int(output))

    def _drift(self) -> None:
        count = int(self.scenario.adapters * self.scenario.drift_share)
        one, other = self._random.integers(0, self.scenario.adapters, (2, count))
        for first, second in zip(one, other, strict=True):
            self.by_rank[[first, second]] = self.by_rank[[second, first]]


def adapter_refs(number: int) -> list[AdapterRef]:
    """The adapters, by number."""
    return [AdapterRef(f"a{index}", hashlib.sha256(b"%d" % index).hexdigest(), "sim") for index in range(number)]


def _draw(random: np.random.Generator, lengths: Lengths, number: int) -> NDArray[np.int64]:
    values = random.lognormal(np.log(lengths.median), lengths.sigma, number)
    return values.clip(lengths.least, lengths.most).astype(np.int64)
