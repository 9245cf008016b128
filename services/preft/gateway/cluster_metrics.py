"""Prometheus metrics of the router and the workers, as the router sees them at the moment. Keeps no state.

A worker that is silent has no figures of its own: zeros would look like a restart to a reader of the counters.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, SummaryMetricFamily
from prometheus_client.registry import Collector

from preft.core.cluster import Role, RouterStats, Tier, TierTotals, WorkerSeen, WorkerState

TELLING = (WorkerState.READY, WorkerState.DRAINING)


@dataclass(frozen=True, slots=True)
class OwnFigures:
    """What a gateway knows of itself; `catalog_age` is in seconds."""

    stats: Callable[[], RouterStats] = RouterStats
    ready: Callable[[], bool] = lambda: True
    catalog_age: Callable[[], float] = lambda: 0.0


class ClusterMetrics(Collector):
    """One metric family per figure, with the labels worker and, if a figure has several, tier."""

    def __init__(
        self,
        workers: Callable[[], Iterable[WorkerSeen]],
        own: OwnFigures,
        roles: Sequence[Role],
        registry: CollectorRegistry,
    ) -> None:
        """Workers of `roles` are counted also while there are none."""
        self._workers = workers
        self._own = own
        self._roles = roles
        registry.register(self)

    def collect(self) -> Iterator[Metric]:
        stats, workers = self._own.stats(), list(self._workers())
        yield GaugeMetricFamily("preft_ready", "1 if this gateway can serve requests.", value=self._own.ready())
        yield GaugeMetricFamily(
            "preft_catalog_age_seconds", "Since the adapter catalog was read.", value=self._own.catalog_age()
        )
        yield GaugeMetricFamily("preft_queue_waiting", "Requests that wait for a worker.", value=stats.waiting)
        yield GaugeMetricFamily(
            "preft_queue_longest_wait_seconds", "Wait of the oldest of them.", value=stats.longest_wait
        )
        yield SummaryMetricFamily(
            "preft_queue_wait_seconds", "From queue to worker.", count_value=stats.leases, sum_value=stats.waited
        )
        for name, help_, total in (
            ("preft_queue_refused", "Requests for which the queue had no room.", stats.refused),
            ("preft_retries", "Attempts that were repeated before the first token.", stats.retries),
            ("preft_resumes", "Attempts that continued after the loss of a worker.", stats.resumes),
        ):
            yield CounterMetricFamily(name, help_, value=total)
        yield from _counts(workers, self._roles)
        yield from _worker_metrics(workers, stats)
        runs_adapters = [seen for seen in workers if seen.worker.adapter_slots and seen.state in TELLING]
        yield from _adapter_metrics(
            [(seen.worker.id, seen.worker.adapter_slots, seen.status.tiers) for seen in runs_adapters]
        )


def _counts(workers: Sequence[WorkerSeen], roles: Sequence[Role]) -> Iterator[Metric]:
    counts = Counter((seen.worker.role, seen.state) for seen in workers)
    number = GaugeMetricFamily("preft_workers", "Registered workers.", labels=["role", "state"])
    info = GaugeMetricFamily("preft_worker_info", "1; tells a worker's role.", labels=["worker", "role"])
    for role in Role:
        if role in roles or any(seen.worker.role is role for seen in workers):
            for state in WorkerState:
                number.add_metric([role, state], counts[role, state])
    for seen in workers:
        info.add_metric([seen.worker.id, seen.worker.role], 1)
    yield from (number, info)


def _worker_metrics(workers: Sequence[WorkerSeen], stats: RouterStats) -> Iterator[Metric]:
    label = ["worker"]
    ready = GaugeMetricFamily("preft_worker_ready", "1 if the worker takes requests.", labels=label)
    draining = GaugeMetricFamily("preft_worker_draining", "1 if the worker only finishes requests.", labels=label)
    running = GaugeMetricFamily("preft_worker_running", "Requests that the worker runs, of all gateways.", labels=label)
    own = GaugeMetricFamily("preft_worker_in_flight", "Requests of this gateway at the worker.", labels=label)
    free = GaugeMetricFamily("preft_kv_blocks_free", "Free KV blocks.", labels=label)
    total = GaugeMetricFamily("preft_kv_blocks", "KV blocks.", labels=label)
    staging = GaugeMetricFamily("preft_staging_bytes", "Memory for KV on its way.", labels=label)
    staged = GaugeMetricFamily("preft_staging_bytes_used", "Of it, what can't make room for other KV.", labels=label)
    preemptions = CounterMetricFamily("preft_preemptions", "Requests that lost their KV blocks.", labels=label)
    stalled = GaugeMetricFamily(
        "preft_engine_stalled_seconds", "Seconds for which the engine hasn't answered; 0: it answers.", labels=label
    )
    for seen in workers:
        key, status = [seen.worker.id], seen.status
        ready.add_metric(key, seen.state is WorkerState.READY)
        draining.add_metric(key, seen.state is WorkerState.DRAINING)
        own.add_metric(key, stats.in_flight.get(seen.worker.id, 0))
        if seen.state not in TELLING:
            continue
        running.add_metric(key, status.running)
        free.add_metric(key, seen.worker.kv_blocks - status.kv_blocks_used)
        total.add_metric(key, seen.worker.kv_blocks)
        staging.add_metric(key, seen.worker.staging_bytes)
        staged.add_metric(key, status.staging_bytes_used)
        preemptions.add_metric(key, status.preemptions)
        stalled.add_metric(key, status.stalled_seconds)
    yield from (ready, draining, running, own, free, total, staging, staged, preemptions, stalled)


def _adapter_metrics(totals: list[tuple[str, int, TierTotals]]) -> Iterator[Metric]:
    tier = ["worker", "tier"]
    slots = GaugeMetricFamily("preft_adapter_slots", "Engine slots for adapters.", labels=["worker"])
    used = GaugeMetricFamily("preft_adapter_slots_used", "Engine slots that hold an adapter.", labels=["worker"])
    held = GaugeMetricFamily("preft_adapters_in_memory", "Adapters in host memory.", labels=["worker"])
    bytes_ = GaugeMetricFamily("preft_adapter_bytes", "Bytes of adapters; on disk, the machine's.", labels=tier)
    hits = CounterMetricFamily("preft_adapter_hits", "Requests by where they found their adapter.", labels=tier)
    seconds = SummaryMetricFamily(
        "preft_adapter_load_seconds", "Bringing adapters into host memory, by where they came from.", labels=tier
    )
    evictions = CounterMetricFamily("preft_adapter_evictions", "Adapters that made room for others.", labels=tier)
    for worker, number, load in totals:
        slots.add_metric([worker], number)
        used.add_metric([worker], load.slots_used)
        held.add_metric([worker], load.host_adapters)
        for name, size in ((Tier.HOST, load.host_bytes), (Tier.DISK, load.disk_bytes)):
            bytes_.add_metric([worker, name], size)
        for name in Tier:
            hits.add_metric([worker, name], load.hits.get(name, 0))
        for name in (Tier.DISK, Tier.SOURCE):
            seconds.add_metric([worker, name], load.loads.get(name, 0), load.load_seconds.get(name, 0.0))
        for name, count in ((Tier.HOST, load.host_evictions), (Tier.DISK, load.disk_evictions)):
            evictions.add_metric([worker, name], count)
    yield from (slots, used, held, bytes_, hits, seconds, evictions)
