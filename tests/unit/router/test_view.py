"""The view of the cluster: what workers tell, what this router has reserved, and indexes that agree with both."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preft.core.cluster import Role, WorkerState
from preft.router.lease import Lease
from preft.router.policy import AffinityPolicy, Demand, Pair
from preft.router.view import ClusterView
from preft.router.worker_view import BREAK_SECONDS, REFUSED_SECONDS, Memory, WorkerView
from support.invented_cluster import STAGED, a_member, a_message, a_worker, check_indexes, d, gone, p, view_of


def alone(worker_id: str = "p0") -> WorkerView:
    """The view of one prefill worker that has told that it has nothing."""
    return view_of(p(worker_id, slots=2)).workers[worker_id]


# Adapters


@given(st.lists(st.tuples(st.sampled_from(["p0", "p1"]), st.sampled_from(["", "a", "b", "c"]), st.booleans())))
def test_slots_are_the_adapters_of_prompts_not_computed_yet(steps: list[tuple[str, str, bool]]) -> None:
    view, running = view_of(p("p0"), p("p1"), max_prefills=10**6), list[tuple[str, str]]()
    for worker, digest, begins in steps:
        if begins:
            running.append((worker, digest))
            view.workers[worker].add_prefill(digest)
        elif (worker, digest) in running:
            running.remove((worker, digest))
            view.workers[worker].drop_prompt(digest)
        for name, one in view.workers.items():
            used = {digest for where, digest in running if where == name and digest}
            assert one.slots_used == len(used)
            assert set(one.slots) == used
            for each in ("a", "b", "c"):
                assert one.in_slot(each) is one.holds(each) is ((name, each) in running)
                assert (name in view.holders.get(each, {})) is ((name, each) in running)


def test_other_routers_prompts_take_slots_too() -> None:
    one = alone()
    one.add_prefill("a")
    one.told(a_message("b", others={"a": 2, "b": 1}))
    assert one.slots_used == 2
    assert one.slots == ["a", "b"]
    assert one.in_slot("b")
    one.told(a_message(others={"b": 0}, whole=False))
    assert one.slots_used == 1
    assert not one.in_slot("b")
    one.told(a_message("b", others={"c": 1}, whole=False))
    one.told(a_message())
    assert one.slots_used == 1
    assert one.slots == ["a"]


def test_a_load_is_known_from_its_begin_to_its_end() -> None:
    view = view_of(p("p0"), p("p1"))
    one, other = view.workers.values()
    one.load_begins("a")
    assert one.is_loading("a")
    assert not other.is_loading("a")
    assert not one.is_loading("b")
    assert not one.holds("a")
    assert view.loaders == {"a": {"p0": one}}
    one.load_ended("a", 0.0, done=True)
    assert not one.is_loading("a")
    assert one.holds("a")
    assert not one.refused("a", 0.0)
    assert view.loaders == {}
    assert view.holders == {"a": {"p0": one}}


def test_loads_that_other_routers_asked_for_are_told() -> None:
    one = alone()
    one.told(a_message(loading="a"))
    assert one.is_loading("a")
    assert not one.holds("a")
    one.told(a_message("a", whole=False))
    assert not one.is_loading("a")
    assert one.holds("a")


def test_a_load_that_failed_is_remembered_for_a_while_or_until_the_next() -> None:
    one = alone()
    for answered in (10.0, 20.0):
        one.load_begins("a")
        one.load_ended("a", answered, done=False)
        assert not one.is_loading("a")
        assert not one.holds("a")
        assert one.refused("a", answered)
        assert one.refused("a", answered + REFUSED_SECONDS - 0.1)
        assert not one.refused("a", answered + REFUSED_SECONDS + 0.1)
    one.load_ended("a", 20.0, done=True)
    assert one.holds("a")
    assert not one.refused("a", 20.0)


def test_old_refusals_are_forgotten() -> None:
    one = alone()
    for number in range(100):
        one.load_ended(f"digest-{number}", float(number), done=False)
    assert len(one._refused) <= REFUSED_SECONDS + 1


def test_an_ended_load_counts_until_the_worker_tells_of_the_adapter() -> None:
    one = alone()
    one.load_ended("a", 0.0, done=True)
    for _ in range(3):
        one.told(a_message("b", whole=False))
        assert one.holds("a")
    one.told(a_message("a", whole=False))
    assert one.holds("a")
    one.told(gone("a"))
    assert not one.holds("a")
    one.load_ended("a", 0.0, done=True)
    one.told(a_message("b"))  # a new stream begins with all that the worker has
    assert not one.holds("a")


def test_a_worker_with_a_new_process_has_nothing() -> None:
    view = view_of(p("p0", adapters="a"), p("p1", adapters="a"), d("d0"))
    old = view.workers["p0"]
    old.load_ended("b", 0.0, done=True)
    old.load_begins("c")
    old.add_prefill("d")
    view.register([a_worker("p0", Role.PREFILL, pid=2), view.workers["p1"].worker, view.workers["d0"].worker])
    new = view.workers["p0"]
    assert new is not old
    assert new.state is WorkerState.DEAD  # until it tells
    assert view.holders == {"a": {"p1": view.workers["p1"]}}
    assert view.loaders == {}
    old.load_ended("c", 0.0, done=True)
    old.drop_prompt("d")
    old.drop_prefill()
    old.told(a_message("x"))
    assert "x" not in view.holders
    check_indexes(view)
    new.told(a_message("e"))
    assert new.is_ready
    assert list(view.holders) == ["a", "e"]
    check_indexes(view)


def test_a_worker_that_is_gone_is_not_ready() -> None:
    """Whatever still points to its view must see that."""
    view = view_of(p("p0"), d("d0"))
    old = view.workers["p0"]
    view.register([view.workers["d0"].worker])
    assert not old.is_ready
    assert not view.serving


# Memory


def test_messages_tell_what_others_use() -> None:
    memory = Memory()
    memory.told(0)
    memory.add(30)
    memory.told(80)
    assert memory.taken == 80  # 50 are somebody else's
    memory.add(-30)
    memory.told(30)  # late: still counts what was ours
    assert memory.taken == 0
    memory.told(30)  # it wasn't ours
    assert memory.taken == 30


@pytest.mark.parametrize("role", [Role.DECODE, Role.COLOCATED])
def test_a_worker_tells_of_blocks_and_staging_memory(role: Role) -> None:
    one = view_of(a_member("w", role, staging=9)).workers["w"]
    one.add_sequences(2, 30)
    one.staging.add(300)
    one.told(a_message(kv_blocks_used=80, staging_bytes_used=800))
    assert (one.blocks.taken, one.staging.taken) == (80, 800)


def test_blocks_of_prefill_workers_dont_count() -> None:
    one = alone()
    one.told(a_message(kv_blocks_used=80))
    assert one.blocks.taken == 0


def test_staging_memory_in_pieces_is_no_room() -> None:
    one = view_of(p("p0", staging=9)).workers["p0"]
    assert one.has_staging(9 * STAGED)
    assert not one.has_staging(9 * STAGED + 1)
    one.told(a_message(staging_bytes_used=4 * STAGED, staging_bytes_fit=2 * STAGED))
    assert one.has_staging(2 * STAGED)
    assert not one.has_staging(3 * STAGED)
    assert one.has_staging(0)
    one.told(a_message(staging_bytes_used=9 * STAGED, staging_bytes_fit=0))
    one.staging.add(STAGED)
    one.staging.add(-STAGED)
    assert not one.has_staging(STAGED)


def test_giving_back_twice_is_an_error() -> None:
    one = alone()
    one.add_prefill("a")
    one.drop_prompt("a")
    with pytest.raises(ValueError, match="no prompt of adapter 'a' that could end"):
        one.drop_prompt("a")
    one.drop_prefill()
    with pytest.raises(ValueError, match="no prefill that could end"):
        one.drop_prefill()
    with pytest.raises(ValueError, match="more memory is given back"):
        one.staging.add(-1)
    with pytest.raises(ValueError, match="no choice that could end"):
        one.add_sequences(-1, 0)


def test_a_lease_gives_back_each_part_once() -> None:
    view, freed = view_of(p("p0"), d("d0")), list[str]()
    prefill, decode = view.workers["p0"], view.workers["d0"]
    demand = Demand("a", 33, 33, 16, choices=2)
    lease = Lease(Pair(prefill, decode), demand, [0, 2], lambda worker: freed.append(worker.id))
    assert (prefill.prefills, decode.blocks.taken, decode.sequences) == (1, 6, 2)
    assert lease.room(0) == 48
    assert lease.grow(0) == 64
    assert (decode.blocks.taken, decode.sequences) == (7, 2)
    lease.choice_ended(0)
    lease.choice_ended(0)
    assert lease.grow(0) == 0
    assert (decode.blocks.taken, decode.sequences) == (3, 1)
    lease.prefill_ended()
    lease.release()
    lease.release()
    assert prefill.idle
    assert decode.idle
    assert freed == ["d0", "p0", "p0", "d0"]  # choice, prompt, prefill, choice


# Failures


def test_a_worker_that_fails_again_and_again_pauses_longer_and_longer() -> None:
    one, now, pauses = alone(), 0.0, list[float]()
    one.failed(now)
    assert one.paused_until == 0.0  # one failure may have any cause
    for _ in range(12):
        now += 0.01
        one.failed(now)
        pauses.append(one.paused_until - now)
        one.failed(now)  # began before the pause
        now = one.paused_until
    least, most = BREAK_SECONDS
    assert pauses[0] == pytest.approx(least)
    assert all(after == pytest.approx(min(most, 2 * before)) for before, after in pairwise(pauses))
    assert pauses[-1] == pytest.approx(most)
    one.succeeded()
    one.failed(now)
    assert one.paused_until == 0.0


def test_the_states_of_a_worker() -> None:
    view = view_of(p("p0"), d("d0"))
    one = view.workers["p0"]
    assert view.serving
    one.told(a_message(draining=True))
    assert one.state is WorkerState.DRAINING
    assert not view.serving
    one.told(a_message())
    assert one.state is WorkerState.READY
    one.lost(0.0)
    one.lost(0.0)
    assert one.state is WorkerState.DEAD
    assert one.failures == 1
    assert not view.serving
    one.told(a_message())
    assert view.serving
    starting = ClusterView(8, 0.25)
    starting.register([type(one.worker)("p0", Role.PREFILL)])
    assert starting.workers["p0"].state is WorkerState.STARTING


# Indexes


def a_registration(draw: random.Random, number: int) -> object:
    role = draw.choice([Role.PREFILL, Role.PREFILL, Role.DECODE, Role.COLOCATED])
    return a_worker(
        f"w{number}",
        role,
        draw.choice("fg"),
        blocks=draw.choice([0, 20]),
        max_num_seqs=draw.choice([0, 4]),
        slots=2,
        staging=draw.choice([0, 5]),
        pid=draw.randint(1, 2),
    )


@given(st.integers(0, 10**6))
@settings(max_examples=100, deadline=None)
def test_the_indexes_agree_with_the_workers_whatever_happens(seed: int) -> None:
    draw = random.Random(seed)
    view, policy, leases = ClusterView(3, 0.25), AffinityPolicy(), list[Lease]()
    known = {number: a_registration(draw, number) for number in range(6)}
    view.register(known.values())  # type: ignore[arg-type]
    for step in range(150):
        one = draw.choice(list(view.workers.values())) if view.workers else None
        digests = draw.sample("abcd", draw.randint(0, 3))
        match draw.choice("ttttlgggggpreebfq"):
            case "t" if one:
                whole, others = one.status is None or draw.random() < 0.2, dict.fromkeys(digests[:1], 1)
                message = a_message(
                    digests[1:],
                    loading=digests[:1],
                    others=others,
                    whole=whole,
                    draining=draw.random() < 0.1,
                    stalled_seconds=draw.choice([0, 0, 7]),
                    kv_blocks_used=draw.randint(0, 9),
                    other_prompts=draw.randint(0, 3),
                    other_sequences=draw.randint(0, 3),
                )
                one.told(message if draw.random() < 0.8 or whole else gone(*digests))
            case "l" if one:
                one.lost(float(step))
            case "g":
                demand = Demand(draw.choice(["", *"abcd"]), draw.randint(1, 60), 60, 16, draw.randint(1, 2))
                placed = policy.place(demand, view, float(step))
                if isinstance(placed, Pair):
                    leases.append(Lease(placed, demand, range(demand.choices), lambda worker: None))
            case "p" if leases:
                draw.choice(leases).prompt_ended()
            case "r" if leases:
                leases.pop(draw.randrange(len(leases))).release()
            case "e" if leases:
                draw.choice(leases).choice_ended(0)
            case "b" if one:
                one.load_begins(draw.choice("abcd"))
            case "f" if one and one.loads:
                one.load_ended(draw.choice(sorted(one.loads)), float(step), done=draw.random() < 0.5)
            case "q":
                number = draw.randrange(6)
                if number in known and draw.random() < 0.5:
                    del known[number]
                else:
                    known[number] = a_registration(draw, number)
                view.register(known.values())  # type: ignore[arg-type]
        check_indexes(view)
    for lease in leases:
        lease.release()
    check_indexes(view)
    assert all(one.idle for one in view.workers.values())
    view.register([])
    check_indexes(view)
    assert view.holders == view.loaders == view.decode == {}
