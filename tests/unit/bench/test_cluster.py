"""The benchmarks of a whole cluster: the compared policy and the tables. Each benchmark itself runs the product."""

from __future__ import annotations

import pytest

from bench.cluster_rig import disk_loads
from bench.routing import LeastLoadedSlot
from bench.streams import Figures, figures_table
from preft.core.cluster import Role, StatusUpdate, Worker, WorkerStatus
from preft.router.policy import Crowded, Demand, Pair
from preft.router.view import ClusterView, WorkerView


@pytest.fixture
def view() -> ClusterView:
    view = ClusterView(8, 0.25)
    shape = {"address": "h:1", "kv_blocks": 100, "staging_bytes": 1 << 20, "max_num_seqs": 8}
    workers = [Worker(f"p{number}", Role.PREFILL, adapter_slots=2, **shape) for number in range(2)]  # type: ignore[arg-type]
    view.register([*workers, Worker("d", Role.DECODE, **shape)])  # type: ignore[arg-type]
    for one in view.workers.values():
        one.told(StatusUpdate(WorkerStatus(staging_bytes_fit=1 << 20), is_whole=True))
    return view


def chosen(view: ClusterView, digest: str) -> WorkerView:
    placed = LeastLoadedSlot().place(Demand(digest, 16, 32, 16), view, 0.0)
    assert isinstance(placed, Pair | Crowded)
    return placed.prefill if isinstance(placed, Pair) else placed.worker


def test_the_compared_policy_takes_the_emptiest_worker_with_a_slot(view: ClusterView) -> None:
    one, other = view.workers["p0"], view.workers["p1"]
    one.add_prefill("a")
    assert chosen(view, "a") is other  # wherever the adapter is
    for digest in ("b", "c"):
        other.add_prefill(digest)
    one.add_prefill("a")
    one.add_prefill("a")
    assert chosen(view, "d") is one  # the other one is emptier, but has no slot left
    assert chosen(view, "b") is other


def test_without_a_slot_anywhere_a_request_waits(view: ClusterView) -> None:
    for worker in ("p0", "p1"):
        for digest in ("a", "b"):
            view.workers[worker].add_prefill(digest)
    assert isinstance(LeastLoadedSlot().place(Demand("c", 16, 32, 16), view, 0.0), Crowded)
    assert isinstance(LeastLoadedSlot().place(Demand("", 16, 32, 16), view, 0.0), Pair)


def test_loads_are_those_of_all_workers() -> None:
    assert disk_loads([{"loads": {"disk": 3, "source": 9}}, {"loads": {}}, {"loads": {"disk": 4}}]) == 7


def test_a_line_per_run_of_streams() -> None:
    runs = [Figures("streams", 100, 0.1, 0.2, 0.001, 0.002, 0.5, 0.003, 0.004, 64 << 20)] * 2
    head, *lines = figures_table(runs).splitlines()
    assert head.split()[:3] == ["streams", "TTFT", "p50"]
    assert lines[0].split() == ["streams", "100", "100.0", "200.0", "1.0", "2.0", "500.0", "3.0", "4.0", "64"]
    assert len(lines) == 2
