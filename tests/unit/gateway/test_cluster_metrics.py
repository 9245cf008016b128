"""The router's and the workers' figures, as Prometheus reads them."""

from __future__ import annotations

from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from preft.core.cluster import Role, RouterStats, Tier, TierTotals, Worker, WorkerSeen, WorkerState, WorkerStatus
from preft.gateway.cluster_metrics import ClusterMetrics, OwnFigures

DOCS = Path(__file__).parents[3] / "docs"
BOTH = (Role.PREFILL, Role.DECODE)


def test_every_figure_of_every_worker() -> None:
    tiers = TierTotals(
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
    prefill = Worker("p", Role.PREFILL, "h:1", kv_blocks=9, adapter_slots=8)
    decode = Worker("d", Role.DECODE, "h:2", kv_blocks=7, staging_bytes=900)
    drained = WorkerStatus(draining=True, running=2, staging_bytes_used=300, preemptions=3, stalled_seconds=12)
    workers = [
        WorkerSeen(prefill, WorkerState.READY, WorkerStatus(kv_blocks_used=5, tiers=tiers), 0.1),
        WorkerSeen(decode, WorkerState.DRAINING, drained, 0.1),
    ]
    stats = RouterStats(
        waiting=4, in_flight={"p": 6}, retries=1, resumes=2, refused=3, longest_wait=1.5, leases=6, waited=7.5
    )
    registry = CollectorRegistry()
    own = OwnFigures(lambda: stats, lambda: False, lambda: 12.5)
    ClusterMetrics(lambda: workers, own, BOTH, registry)
    expected = {
        ("preft_ready", "", ""): 0,
        ("preft_catalog_age_seconds", "", ""): 12.5,
        ("preft_queue_waiting", "", ""): 4,
        ("preft_queue_longest_wait_seconds", "", ""): 1.5,
        ("preft_queue_wait_seconds_count", "", ""): 6,
        ("preft_queue_wait_seconds_sum", "", ""): 7.5,
        ("preft_queue_refused_total", "", ""): 3,
        ("preft_retries_total", "", ""): 1,
        ("preft_resumes_total", "", ""): 2,
        ("preft_worker_ready", "p", ""): 1,
        ("preft_worker_ready", "d", ""): 0,
        ("preft_worker_draining", "p", ""): 0,
        ("preft_worker_draining", "d", ""): 1,
        ("preft_worker_running", "d", ""): 2,
        ("preft_worker_in_flight", "p", ""): 6,
        ("preft_worker_in_flight", "d", ""): 0,
        ("preft_kv_blocks_free", "p", ""): 4,
        ("preft_kv_blocks", "d", ""): 7,
        ("preft_staging_bytes", "d", ""): 900,
        ("preft_staging_bytes_used", "d", ""): 300,
        ("preft_preemptions_total", "d", ""): 3,
        ("preft_engine_stalled_seconds", "p", ""): 0,
        ("preft_engine_stalled_seconds", "d", ""): 12,
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
        labels = {key: label for key, label in (("worker", worker), ("tier", tier)) if label}
        assert registry.get_sample_value(name, labels) == value, name
    assert registry.get_sample_value("preft_workers", {"role": "prefill", "state": "ready"}) == 1
    assert registry.get_sample_value("preft_workers", {"role": "prefill", "state": "dead"}) == 0
    assert registry.get_sample_value("preft_workers", {"role": "decode", "state": "draining"}) == 1
    assert registry.get_sample_value("preft_workers", {"role": "colocated", "state": "ready"}) is None
    assert registry.get_sample_value("preft_worker_info", {"worker": "d", "role": "decode"}) == 1
    assert registry.get_sample_value("preft_adapter_slots", {"worker": "d"}) is None
    workers.clear()
    assert registry.get_sample_value("preft_workers", {"role": "prefill", "state": "ready"}) == 0
    assert registry.get_sample_value("preft_kv_blocks", {"worker": "d"}) is None


@pytest.mark.parametrize("state", [WorkerState.DEAD, WorkerState.STARTING])
def test_a_silent_worker_has_no_figures(state: WorkerState) -> None:
    """A counter that fell to zero and rose again would count everything twice."""
    worker = WorkerSeen(Worker("p", Role.PREFILL, kv_blocks=9, adapter_slots=8), state, WorkerStatus(), 9.0)
    registry = CollectorRegistry()
    ClusterMetrics(lambda: [worker], OwnFigures(lambda: RouterStats(0, {"p": 2}, 0, 0, 0)), BOTH, registry)
    samples = [
        sample for family in registry.collect() for sample in family.samples if list(sample.labels) == ["worker"]
    ]
    values = {sample.name: sample.value for sample in samples}
    assert values == {"preft_worker_ready": 0, "preft_worker_draining": 0, "preft_worker_in_flight": 2}


def test_every_metric_is_documented() -> None:
    registry = CollectorRegistry()
    ClusterMetrics(list, OwnFigures(), BOTH, registry)
    text = (DOCS / "http.md").read_text() + (DOCS / "adapter-store.md").read_text()
    kinds = {"counter": "_total"}
    names = [family.name + kinds.get(family.type, "") for family in registry.collect()]
    assert len(names) == 27
    assert [name for name in names if f"`{name}" not in text] == []
