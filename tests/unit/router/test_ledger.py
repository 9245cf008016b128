"""The ledger's words about adapters: which prompts use them, which worker loads or has just loaded them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from preft.router.ledger import HEARTBEATS, Ledger

from preft.core.cluster import Role, Worker, WorkerState


def beat(at: float, worker_id: str = "p0") -> Worker:
    return Worker(worker_id, Role.PREFILL, WorkerState.READY, "h:1", "f", 1, heartbeat=at)


@given(st.lists(st.tuples(st.sampled_from(["p0", "p1"]), st.sampled_from(["", "a", "b", "c"]), st.booleans())))
def test_slots_are_the_adapters_of_prompts_not_computed_yet(steps: list[tuple[str, str, bool]]) -> None:
    ledger, running = Ledger(), list[tuple[str, str]]()
    for worker, digest, begins in steps:
        if begins:
            running.append((worker, digest))
            ledger.add_prefill(worker, digest)
        elif (worker, digest) in running:
            running.remove((worker, digest))
            ledger.drop_prompt(worker, digest)
        for each in ("p0", "p1"):
            assert ledger.distinct_adapters(each) == len({d for w, d in running if w == each and d})
            for one in ("", "a", "b", "c"):
                assert ledger.prompts_of(each, one) == running.count((each, one))
                assert ledger.loaded(each, one) is ((each, one) in running)


def test_a_load_is_known_from_its_begin_to_its_end() -> None:
    ledger = Ledger()
    ledger.load_begins("p0", "a")
    assert ledger.loading("p0", "a")
    assert not ledger.loading("p1", "a")
    assert not ledger.loading("p0", "b")
    assert not ledger.loaded("p0", "a")
    ledger.load_ended("p0", "a", done=True)
    assert not ledger.loading("p0", "a")
    assert ledger.loaded("p0", "a")
    assert not ledger.refused("p0", "a")


def test_a_load_that_failed_is_remembered_until_the_next() -> None:
    ledger = Ledger()
    ledger.load_begins("p0", "a")
    ledger.load_ended("p0", "a", done=False)
    assert not ledger.loading("p0", "a")
    assert not ledger.loaded("p0", "a")
    assert ledger.refused("p0", "a")
    ledger.load_ended("p0", "a", done=True)
    assert ledger.loaded("p0", "a")
    assert not ledger.refused("p0", "a")


def test_words_about_loads_count_for_a_few_heartbeats() -> None:
    ledger = Ledger()
    ledger.observe([beat(1.0)])
    ledger.load_ended("p0", "a", done=True)
    ledger.load_ended("p0", "b", done=False)
    for number in range(2, HEARTBEATS + 1):
        for _ in range(5):  # the same heartbeat, polled again and again
            ledger.observe([beat(float(number))])
        assert ledger.loaded("p0", "a")
        assert ledger.refused("p0", "b")
    ledger.observe([beat(9.0)])
    assert not ledger.loaded("p0", "a")
    assert not ledger.refused("p0", "b")


def test_a_worker_that_is_gone_has_nothing() -> None:
    ledger = Ledger()
    ledger.observe([beat(1.0), beat(1.0, "p1")])
    ledger.load_ended("p0", "a", done=True)
    ledger.load_ended("p1", "a", done=True)
    ledger.observe([beat(1.0, "p1")])
    ledger.observe([beat(1.0), beat(1.0, "p1")])
    assert not ledger.loaded("p0", "a")
    assert ledger.loaded("p1", "a")


def test_slots_are_kept_until_they_arent() -> None:
    ledger = Ledger()
    ledger.keep_slots("p0")
    assert ledger.slots_kept("p0")
    assert not ledger.slots_kept("p1")
    ledger.keep_no_slots()
    assert not ledger.slots_kept("p0")
