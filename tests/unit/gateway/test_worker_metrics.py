"""What workers say in their heartbeats, as Prometheus reads it."""

from __future__ import annotations

from prometheus_client import CollectorRegistry

from preft.core.cluster import AdapterLoad, Role, Tier, Worker, WorkerLoad, WorkerState
from preft.gateway.worker_metrics import WorkerMetrics


def a_worker(name: str, slots: int, load: WorkerLoad) -> Worker:
    return Worker(name, Role.PREFILL, WorkerState.READY, "h:1", "f", 1, adapter_slots=slots, load=load)


def test_every_figure_of_every_worker() -> None:
    tiers = AdapterLoad(
        slots=8,
        slots_used=3,
        host_adapters=5,
        host_bytes=1000,
        host_bytes_total=4000,
        disk_bytes=9000,
        host_evictions=2,
        disk_evictions=1,
        hits={Tier.SLOT: 7, Tier.HOST: 6, Tier.DISK: 4},
        loads={Tier.DISK: 4},
        load_seconds={Tier.DISK: 0.5, Tier.SOURCE: 0.0},
    )
    workers = [
        a_worker("p", 8, WorkerLoad(kv_blocks_total=9, kv_blocks_free=4, tiers=tiers)),
        a_worker("d", 0, WorkerLoad(0, 7, 7, 900, 500, staging_bytes_evictable=200, preemptions=3)),
    ]
    registry = CollectorRegistry()
    WorkerMetrics(lambda: workers, registry)
    expected = {
        ("preft_kv_blocks_free", "p", ""): 4,
        ("preft_kv_blocks", "d", ""): 7,
        ("preft_staging_bytes", "d", ""): 900,
        ("preft_staging_bytes_used", "d", ""): 300,
        ("preft_preemptions_total", "d", ""): 3,
        ("preft_adapter_slots", "p", ""): 8,
        ("preft_adapter_slots_used", "p", ""): 3,
        ("preft_adapters_in_memory", "p", ""): 5,
        ("preft_adapter_bytes", "p", "host"): 1000,
        ("preft_adapter_bytes", "p", "disk"): 9000,
        ("preft_adapter_hits_total", "p", "slot"): 7,
        ("preft_adapter_hits_total", "p", "host"): 6,
        ("preft_adapter_hits_total", "p", "disk"): 4,
        ("preft_adapter_hits_total", "p", "source"): 0,
        ("preft_adapter_load_seconds_count", "p", "disk"): 4,
        ("preft_adapter_load_seconds_sum", "p", "disk"): 0.5,
        ("preft_adapter_load_seconds_count", "p", "source"): 0,
        ("preft_adapter_evictions_total", "p", "host"): 2,
        ("preft_adapter_evictions_total", "p", "disk"): 1,
    }
    for (name, worker, tier), value in expected.items():
        labels = {"worker": worker, **({"tier": tier} if tier else {})}
        assert registry.get_sample_value(name, labels) == value, name
    assert registry.get_sample_value("preft_adapter_slots", {"worker": "d"}) is None
    workers.clear()
    assert registry.get_sample_value("preft_kv_blocks", {"worker": "d"}) is None
