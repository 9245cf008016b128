"""Prometheus metrics of the workers, from their last heartbeats. Keeps no state."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, SummaryMetricFamily
from prometheus_client.registry import Collector

from preft.core.cluster import AdapterLoad, Tier, Worker


class WorkerMetrics(Collector):
    """One metric family per figure, with the labels worker and, if a figure has several, tier."""

    def __init__(self, workers: Callable[[], Iterable[Worker]], registry: CollectorRegistry) -> None:
        self._workers = workers
        registry.register(self)

    def collect(self) -> Iterator[Metric]:
        free = GaugeMetricFamily("preft_kv_blocks_free", "Free KV blocks.", labels=["worker"])
        total = GaugeMetricFamily("preft_kv_blocks", "KV blocks.", labels=["worker"])
        staging = GaugeMetricFamily("preft_staging_bytes", "Memory for KV on its way.", labels=["worker"])
        staged = GaugeMetricFamily(
            "preft_staging_bytes_used", "Of it, what can't make room for other KV.", labels=["worker"]
        )
        preemptions = CounterMetricFamily("preft_preemptions", "Requests that lost their KV blocks.", labels=["worker"])
        workers = list(self._workers())
        for worker in workers:
            load = worker.load
            free.add_metric([worker.id], load.kv_blocks_free)
            total.add_metric([worker.id], load.kv_blocks_total)
            staging.add_metric([worker.id], load.staging_bytes_total)
            staged.add_metric([worker.id], load.staging_bytes_used - load.staging_bytes_evictable)
            preemptions.add_metric([worker.id], load.preemptions)
        yield from (free, total, staging, staged, preemptions)
        yield from _adapter_metrics([(worker.id, worker.load.tiers) for worker in workers if worker.adapter_slots])


def _adapter_metrics(loads: list[tuple[str, AdapterLoad]]) -> Iterator[Metric]:
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
    for worker, load in loads:
        slots.add_metric([worker], load.slots)
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
