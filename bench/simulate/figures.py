"""The figures of one run."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from bench.simulate.attempt import SimRequest
from bench.simulate.clock import quantile, rounded
from bench.simulate.scenario import Scenario

if TYPE_CHECKING:
    from bench.simulate.cluster import Cluster

TAIL_SHARE = 0.8  # of the adapters: the least popular ones are the tail


@dataclass(frozen=True, slots=True)
class Totals:
    """What all prefill workers have done so far. `busy` is in seconds, by worker."""

    loads: int = 0
    steps: int = 0
    step_adapters: int = 0
    busy: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, cluster: Cluster) -> Totals:
        nodes = [*cluster.prefill.values(), *cluster.gone]
        return cls(
            sum(node.memory.loads for node in nodes),
            sum(node.steps for node in nodes),
            sum(node.step_adapters for node in nodes),
            {key: node.busy for key, node in cluster.prefill.items()},
        )


@dataclass(slots=True)
class Run:
    """`requests` are those that came after the warm-up. `turns` and `decisions` are real times in seconds."""

    scenario: Scenario
    policy: str
    patience: float
    requests: list[SimRequest] = field(default_factory=list)
    finished: int = 0
    refused: int = 0
    retried: int = 0
    full: int = 0  # refused by a worker whose slots another router's prompts had
    unfinished: int = 0
    in_flight: dict[tuple[str, str], int] = field(default_factory=dict)
    before: Totals = Totals()
    after: Totals = Totals()
    turns: array[float] = field(default_factory=lambda: array("d"))
    decisions: array[float] = field(default_factory=lambda: array("d"))
    seconds: float = 0.0

    def figures(self) -> dict[str, float]:
        """All figures. Those whose names begin with `real_` differ from run to run, the others don't."""
        return rounded({**self.virtual(), **self.real()})

    def virtual(self) -> dict[str, float]:
        served = [one for one in self.requests if one.first_token >= 0]
        ttft = [one.first_token - one.arrival.at for one in served]
        tail = [one for one in served if one.adapter and self._is_tail(one)]
        waits = [one.begun - one.arrival.at for one in tail]
        bound = self.scenario.wait_bound(self.patience)
        steps = self.after.steps - self.before.steps
        lost = {f"prefill-{loss.worker}" for loss in self.scenario.losses if not loss.decode}
        busy = [value - self.before.busy.get(key, 0.0) for key, value in self.after.busy.items() if key not in lost]
        return {
            "requests": len(self.requests),
            "refused": self.refused,
            "retried": self.retried,
            "full": self.full,
            "unfinished": self.unfinished,
            "loads_per_1000": 1000 * (self.after.loads - self.before.loads) / max(1, len(self.requests)),
            "adapters_per_step": (self.after.step_adapters - self.before.step_adapters) / max(1, steps),
            "ttft_p50": quantile(ttft, 0.5),
            "ttft_p99": quantile(ttft, 0.99),
            "ttft_max": max(ttft, default=0.0),
            "tail_wait_p99": quantile(waits, 0.99),
            "tail_wait_max": max(waits, default=0.0),
            "tail_over_bound": sum(wait > bound for wait in waits) / max(1, len(waits)),
            "balance": max(busy) * len(busy) / sum(busy) if sum(busy) else 0.0,
            "utilization": sum(busy) / len(busy) / self.scenario.seconds if busy else 0.0,
        }

    def real(self) -> dict[str, float]:
        router = sum(self.turns)
        return {
            "real_decisions": len(self.decisions),
            "real_decision_p50": quantile(self.decisions, 0.5),
            "real_decision_p99": quantile(self.decisions, 0.99),
            "real_decisions_per_second": len(self.decisions) / max(1e-9, sum(self.decisions)),
            "real_requests_per_second": len(self.requests) / max(1e-9, router),
            "real_turn_p99": quantile(self.turns, 0.99),
            "real_turn_max": max(self.turns, default=0.0),
            "real_seconds": self.seconds,
        }

    def _is_tail(self, request: SimRequest) -> bool:
        return request.arrival.rank >= self.scenario.adapters * (1 - TAIL_SHARE)
