"""How full workers are."""

from __future__ import annotations

import pytest

from preft.core.cluster import Role
from preft.router.pressure import MOST, decode_pressure, least_used, prefill_pressure
from support.invented_cluster import a_message, d, p, view_of


def test_prefill_workers_are_as_full_as_their_slots_prompts_or_queue() -> None:
    view = view_of(p("p0", slots=4), p("p1", slots=4), d("d0"), max_prefills=8)
    assert prefill_pressure(view, 0.0) == 0.0
    view.workers["p0"].add_prefill("a")
    view.workers["p1"].told(a_message(others={"b": 1}, other_prompts=1))
    assert prefill_pressure(view, 0.0) == 2 / 8  # slots
    for _ in range(5):
        view.workers["p0"].add_prefill("a")
    assert prefill_pressure(view, 0.0) == 7 / 16  # prompts
    assert prefill_pressure(view, 0.9) == 0.9
    assert prefill_pressure(view, 99.0) == MOST


def test_decode_workers_are_as_full_as_their_memory_or_batch() -> None:
    view = view_of(p("p0"), d("d0", blocks=100, max_num_seqs=8), d("d1", blocks=300, max_num_seqs=8))
    view.workers["d0"].add_sequences(1, 100)
    assert decode_pressure(view) == 100 / 400
    view.workers["d1"].told(a_message(other_sequences=7))
    assert decode_pressure(view) == 8 / 16
    assert least_used([view.workers["d0"], view.workers["d1"]], Role.DECODE).id == "d1"


def test_without_workers_there_is_no_pressure() -> None:
    view = view_of()
    assert (prefill_pressure(view, 9.0), decode_pressure(view)) == (0.0, 0.0)


@pytest.mark.parametrize("slots", [0, 2])
def test_the_least_used_prefill_worker(slots: int) -> None:
    view = view_of(p("p0", slots=slots, adapters="ab"), p("p1", slots=slots, adapters="a"), d("d0"))
    workers = list(view.workers.values())[:2]
    assert least_used(workers, Role.PREFILL).id == "p1"  # it has fewer adapters
    view.workers["p1"].add_prefill("a")
    assert least_used(workers, Role.PREFILL).id == "p0"
