"""The choice of workers: what always holds, and how a thousand workers fare under it."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Collection
from dataclasses import replace
from statistics import median
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from preft.core.cluster import AdapterState, AdapterStatus, Role, StatusUpdate, Worker, WorkerState, WorkerStatus
from preft.memory.arena import span_of
from preft.router.lease import Lease
from preft.router.policy import Absent, AffinityPolicy, Crowded, Demand, Pair, Refusal
from preft.router.view import ClusterView
from preft.router.worker_view import WORK_TOKENS, WorkerView
from preft.transfer.seal import SEAL
from support.invented_cluster import Member, a_member, a_message, d, gone, p, view_of
from support.readable_ref import ReadableRef

POLICY = AffinityPolicy(load_price=5)
NOW = 1000.0
WAITED_LONG = (NOW - 99.0, 0, NOW - 99.0)  # the order of a request that others must not overtake
JUST_CAME = (NOW, 1, NOW)
IDS = st.sampled_from([f"w{i}" for i in range(8)])


def a_demand(digest: str = "a", tokens: int = 32, choices: int = 1, prompt: int = 16) -> Demand:
    return Demand(digest, tokens, tokens, prompt, choices, order=JUST_CAME)


def loaded_demand(digest: str = "a", **options: int) -> Demand:
    return replace(a_demand(digest, **options), adapter=ReadableRef(digest, digest, "/"))


def place(view: ClusterView, demand: Demand) -> Pair:
    placed = POLICY.place(demand, view, NOW)
    assert isinstance(placed, Pair)
    return placed


def lease(view: ClusterView, demand: Demand) -> Lease:
    return Lease(place(view, demand), demand, range(demand.choices), lambda worker: None)


def fill(view: ClusterView, worker_id: str, *digests: str) -> None:
    for digest in digests:
        view.workers[worker_id].add_prefill(digest)


def look(view: ClusterView, digest: str = "a") -> tuple[str, str]:
    """What the policy says of a request under this adapter, and about which worker."""
    placed = POLICY.place(loaded_demand(digest), view, NOW)
    assert not isinstance(placed, Refusal)
    return type(placed).__name__, (placed.prefill if isinstance(placed, Pair) else placed.worker).id


def decoder(pair: Pair) -> str:
    return pair.decode.id if pair.decode else ""


def clusters(staging: st.SearchStrategy[int]) -> st.SearchStrategy[list[Member]]:
    return st.lists(
        st.builds(
            a_member,
            worker_id=IDS,
            role=st.sampled_from(Role),
            fingerprint=st.sampled_from(["f", "g"]),
            blocks=st.integers(0, 20),
            state=st.sampled_from([WorkerState.READY, *WorkerState]),
            adapters=st.sets(st.sampled_from(["a", "b", "c"])).map(tuple),
            max_num_seqs=st.integers(0, 3),
            slots=st.integers(0, 2),
            staging=staging,
            stalled=st.sampled_from([0, 0, 9]),
        ),
        max_size=8,
        unique_by=lambda member: member.worker.id,
    )


members = clusters(st.just(0)) | clusters(st.integers(1, 5))  # workers of one fingerprint have KV blocks of one size
demands = st.builds(
    Demand,
    digest=st.sampled_from(["", "a", "b", "c"]),
    kv_tokens=st.integers(1, 200),
    max_tokens=st.just(0),
    prompt_tokens=st.integers(1, 64),
    choices=st.integers(1, 3),
    decodes=st.booleans(),
    order=st.just(JUST_CAME),
)
avoids = st.frozensets(IDS, max_size=3)


def filled(members: list[Member], before: list[Demand]) -> ClusterView:
    view = view_of(*members)
    for demand in before:
        pair = POLICY.place(demand, view, NOW)
        if isinstance(pair, Pair):
            Lease(pair, demand, range(demand.choices), lambda worker: None)
    return view


def answering(member: Member) -> Member:
    """The same worker, whose engine doesn't stall."""
    if member.update is None:
        return member
    return replace(member, update=replace(member.update, status=replace(member.update.status, stalled_seconds=0)))


def not_in(ids: Collection[str], workers: list[WorkerView]) -> list[WorkerView]:
    return [one for one in workers if one.id not in ids]


@st.composite
def views(draw: st.DrawFn) -> ClusterView:
    """Loads under way, ended and refused, prompts that run, and old requests, whatever the policy would have done."""
    view = view_of(*draw(members))
    steps = st.lists(st.tuples(IDS, st.sampled_from(["a", "b", "c"]), st.integers(0, 5)), max_size=20)
    for worker_id, digest, what in draw(steps):
        one = view.workers.get(worker_id)
        if one is None:
            continue
        if what == 0:
            one.load_begins(digest)
        elif what <= 2:
            one.load_ended(digest, NOW, done=what == 1)
        elif what == 3:
            one.add_prefill(digest)
        elif what == 4:
            one.slot_for = WAITED_LONG
        else:
            one.memory_for = WAITED_LONG
    return view


def picture(view: ClusterView) -> str:
    """All that a view says, in one string."""
    workers = [replace(one, cluster=None) for one in view.workers.values()]
    orders = [one.id for one in view.prefill], [[one.id for one in index] for index in view.decode.values()]
    lists = [{digest: list(places) for digest, places in index.items()} for index in (view.holders, view.loaders)]
    return repr((workers, orders, lists, sorted(view.stalled)))


@given(views(), demands, avoids)
@settings(max_examples=300, deadline=None)
def test_a_choice_changes_nothing_and_is_always_the_same(
    view: ClusterView, demand: Demand, avoid: frozenset[str]
) -> None:
    demand = replace(demand, avoid=avoid, adapter=ReadableRef("a", "a", "/") if demand.digest else None)
    before = picture(view)
    placed, home = POLICY.place(demand, view, NOW), POLICY.home(demand, view, NOW)
    assert POLICY.place(demand, view, NOW) == placed
    assert POLICY.home(demand, view, NOW) is home
    assert picture(view) == before


@given(members, st.lists(demands, max_size=12), demands, avoids)
@settings(max_examples=200, deadline=None)
def test_a_choice_always_fits(
    members: list[Member], before: list[Demand], demand: Demand, avoid: frozenset[str]
) -> None:
    view = filled(members, before)
    pair = POLICY.place(replace(demand, avoid=avoid), view, NOW)
    if not isinstance(pair, Pair):
        return
    assert pair.prefill.worker.role is not Role.DECODE
    assert pair.prefill.state is WorkerState.READY
    assert pair.prefill.prefills < view.max_prefills
    assert not pair.prefill.is_stalled or all(one.is_stalled for one in view.prompting())
    if not demand.decodes:
        assert pair.decode is None
        return
    assert pair.decode is not None
    assert (pair.decode is pair.prefill) is (pair.prefill.worker.role is Role.COLOCATED)
    assert pair.decode.worker.role is not Role.PREFILL
    assert pair.decode.state is WorkerState.READY
    assert not pair.decode.is_stalled or all(one.is_stalled for one in view.decode[pair.decode.worker.fingerprint])
    assert pair.decode.worker.fingerprint == pair.prefill.worker.fingerprint
    needed = demand.blocks(pair.decode.worker) * demand.choices
    assert pair.decode.blocks.taken + needed <= pair.decode.worker.kv_blocks
    for one in (pair.prefill, pair.decode):
        assert one.staging.taken + demand.staging(one.worker) <= one.worker.staging_bytes


@given(members, st.lists(demands, max_size=12), demands, avoids)
@settings(max_examples=200, deadline=None)
def test_a_refusal_is_the_truth(
    members: list[Member], before: list[Demand], demand: Demand, avoid: frozenset[str]
) -> None:
    """Without limits on batch and slots, and without stalled workers: refused only if no pair fits.

    A failed worker is better than none.

    The base model's requests alone: an adapter's may wait for a worker that has it.
    """
    demand = replace(demand, digest="")
    members = [replace(one, worker=replace(one.worker, max_num_seqs=0, adapter_slots=0)) for one in members]
    view = filled([answering(one) for one in members], before)

    def stages(one: WorkerView) -> bool:
        taken = one.staging.taken + demand.staging(one.worker)
        return not demand.staging(one.worker) or taken <= one.worker.staging_bytes

    ready = [one for one in view.workers.values() if one.is_ready]
    prefill = [one for one in ready if one.worker.role is not Role.DECODE and one.prefills < view.max_prefills]
    decode = [one for one in ready if one.worker.role is not Role.PREFILL]
    fits = any(
        not demand.decodes
        or (
            one.worker.fingerprint == other.worker.fingerprint
            and other.blocks.taken + demand.blocks(other.worker) * demand.choices <= other.worker.kv_blocks
            and stages(other)
        )
        for one in prefill
        if stages(one)
        for other in (decode if demand.decodes else [one])
    )
    assert isinstance(POLICY.place(demand, view, NOW), Pair) is fits
    if not fits:
        assert isinstance(POLICY.place(replace(demand, avoid=avoid), view, NOW), Refusal)


@given(views(), st.lists(demands, max_size=12), demands, demands, st.integers(-200, 0), st.integers(0, 200))
@settings(max_examples=200, deadline=None)
def test_a_refusal_holds_for_younger_requests_that_ask_more(
    view: ClusterView, before: list[Demand], small: Demand, other: Demand, came: int, later: int
) -> None:
    """What lets the queue skip: see `Policy.place`."""
    for demand in before:
        if isinstance(pair := POLICY.place(demand, view, NOW), Pair):
            Lease(pair, demand, range(demand.choices), lambda worker: None)
    small = replace(small, order=(NOW + came, 0, NOW + came))
    other = replace(other, order=(NOW + came + later, 1, NOW + came + later))
    refusal = POLICY.place(small, view, NOW)
    if refusal is Refusal.NO_PREFILL or (isinstance(refusal, Refusal) and other.covers(small)):
        assert isinstance(POLICY.place(other, view, NOW), Refusal)


@given(views(), demands, avoids)
@settings(max_examples=300, deadline=None)
def test_an_adapters_request_goes_only_where_the_adapter_is_and_has_a_slot(
    view: ClusterView, demand: Demand, avoid: frozenset[str]
) -> None:
    digest = demand.digest
    demand = replace(demand, avoid=avoid, adapter=ReadableRef(digest, digest, "/") if digest else None)
    placed = POLICY.place(demand, view, NOW)
    if isinstance(placed, Refusal):
        return
    if not digest:
        assert isinstance(placed, Pair)  # without an adapter there is nothing to load, and no slot to wait for
        return
    one = placed.prefill if isinstance(placed, Pair) else placed.worker
    worker = one.worker
    held = one.holds(digest)
    full = one.prefills >= view.max_prefills or one.memory_for is not None
    full |= bool(demand.staging(worker)) and demand.staging(worker) > worker.staging_bytes
    shares = one.in_slot(digest)  # a slot that its adapter has, however many others have one
    no_slot = bool(worker.adapter_slots and not shares and one.slots_used >= worker.adapter_slots)
    no_slot |= bool(worker.adapter_slots) and one.slot_for is not None
    assert held is not isinstance(placed, Absent)
    assert not demand.decodes or worker.fingerprint in view.decode
    if isinstance(placed, Crowded):
        assert full or no_slot
    if isinstance(placed, Pair):
        assert not full
        assert not no_slot
    if isinstance(placed, Absent) and one.refused(digest, NOW):  # not asked again where others have it
        ready = list(view.prompting())
        healthy = [each for each in ready if not each.is_stalled]
        ready = not_in(avoid, healthy) or healthy or not_in(avoid, ready) or ready
        ready = [each for each in ready if not demand.decodes or each.worker.fingerprint == worker.fingerprint]
        ready = [each for each in ready if demand.staging(each.worker) <= each.worker.staging_bytes]
        assert not any(each.holds(digest) for each in ready)


@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=3),
    st.lists(st.tuples(st.booleans(), st.sampled_from(["", *"abcdef"]), st.integers(0, 99)), max_size=60),
)
@settings(max_examples=300, deadline=None)
def test_slots_are_never_overrun(slots: list[int], steps: list[tuple[bool, str, int]]) -> None:
    """Requests that come at random, and prompts and prefills that end at random."""
    view = view_of(*(p(f"p{i}", slots=n, adapters="abcdef") for i, n in enumerate(slots)), d("d0"))
    leases = list[Lease]()
    for comes, digest, which in steps:
        if comes:
            demand = a_demand(digest, tokens=1)
            placed = POLICY.place(demand, view, NOW)
            if isinstance(placed, Pair):
                leases.append(Lease(placed, demand, [0], lambda worker: None))
            elif isinstance(placed, Crowded):
                assert digest
        elif leases:
            one = leases[which % len(leases)]
            one.prompt_ended() if which % 3 else one.release()
        for i, limit in enumerate(slots):
            assert not limit or view.workers[f"p{i}"].slots_used <= limit
    for one in leases:
        one.release()
    assert all(one.idle for one in view.workers.values())


# Decode workers


def test_decode_knows_no_adapters() -> None:
    view = view_of(p("p0"), p("p1"), d("d0", used=50), d("d1", used=50), d("d2"))
    assert {decoder(place(view, a_demand(digest))) for digest in "abcdefgh"} == {"d2"}


def test_decode_goes_where_room_is() -> None:
    view = view_of(p("p0"), d("d0"), d("d1"))
    view.workers["d0"].add_sequences(1, 50)
    assert decoder(place(view, a_demand())) == "d1"


def test_decode_goes_where_the_batch_is_small() -> None:
    view = view_of(p("p0"), d("d0", blocks=10_000, max_num_seqs=8), d("d1", blocks=10_000, max_num_seqs=8))
    view.workers["d0"].add_sequences(5, 1)
    view.workers["d1"].add_sequences(2, 100)
    assert decoder(place(view, a_demand())) == "d1"
    view.workers["d1"].told(a_message(kv_blocks_used=100, other_sequences=6))
    assert decoder(place(view, a_demand())) == "d0"


def test_a_batch_has_its_limit_but_takes_any_single_request() -> None:
    view = view_of(p("p0"), d("d0", max_num_seqs=4))
    assert place(view, a_demand(choices=9)).decode is not None
    view.workers["d0"].add_sequences(5, 1)
    assert POLICY.place(a_demand(), view, NOW) is Refusal.NO_DECODE


def test_other_routers_sequences_count_in_a_batch() -> None:
    view = view_of(p("p0"), d("d0", max_num_seqs=4))
    view.workers["d0"].told(a_message(other_sequences=5))
    assert POLICY.place(a_demand(), view, NOW) is Refusal.NO_DECODE


def test_a_request_of_many_choices_need_not_wait_for_an_empty_batch() -> None:
    """It would keep the worker from everybody until its last sequence has ended. Its own wait in the engine."""
    view = view_of(p("p0"), d("d0", blocks=1000, max_num_seqs=8))
    view.workers["d0"].add_sequences(8, 1)
    assert place(view, a_demand(choices=100)).decode is not None
    view.workers["d0"].add_sequences(1, 1)
    assert POLICY.place(a_demand(choices=100), view, NOW) is Refusal.NO_DECODE


# Staging memory


def test_prompts_go_where_staging_memory_is() -> None:
    """On both sides; the base model's and an adapter's."""
    view = view_of(
        p("p0", staging=1, adapters="a"), p("p1", staging=4, adapters="a"), d("d0", staging=1), d("d1", staging=4)
    )
    for digest in ("", "a"):
        pair = place(view, a_demand(digest, prompt=32))
        assert (pair.prefill.id, decoder(pair)) == ("p1", "d1")


def test_what_has_no_staging_memory_waits_until_some_is_given_back() -> None:
    view, leases = view_of(p("p0", staging=2), d("d0", staging=3)), list[Lease]()
    for _ in range(2):
        leases.append(lease(view, a_demand("")))
    assert POLICY.place(a_demand(""), view, NOW) is Refusal.NO_STAGING
    leases[0].prefill_ended()
    leases.append(Lease(place(view, a_demand("")), a_demand(""), [0, 1], lambda worker: None))
    leases[1].prefill_ended()
    assert POLICY.place(a_demand(""), view, NOW) is Refusal.NO_DECODE
    leases[2].kv_loaded(0)
    assert POLICY.place(a_demand(""), view, NOW) is Refusal.NO_DECODE  # the other choice has no copy yet
    leases[2].kv_loaded(1)
    assert place(view, a_demand(""))
    assert isinstance(POLICY.place(replace(a_demand(""), decodes=False), view, NOW), Pair)  # sends nothing
    for one in leases:
        one.release()
        one.kv_loaded(0)  # a late token changes nothing
    assert all(one.idle for one in view.workers.values())


def test_an_adapters_worker_without_staging_memory_is_waited_for_or_passed_by() -> None:
    alone = view_of(p("p0", staging=1, adapters="a"), d("d0", staging=9))
    lease(alone, a_demand())
    assert POLICY.place(a_demand(), alone, NOW) is Refusal.NO_STAGING
    two = view_of(p("p0", staging=1, adapters="a"), p("p1", staging=1, adapters="a"), d("d0", staging=9))
    first = lease(two, a_demand())
    assert {first.prefill.id, place(two, a_demand()).prefill.id} == {"p0", "p1"}


@given(st.integers(1, 400), st.integers(1, 64))
def test_a_prompt_takes_no_more_than_is_reserved(tokens: int, block_bytes: int) -> None:
    """What is reserved on a worker is a little more than the arena's regions take, never less."""
    worker = Worker("w", Role.PREFILL, block_bytes=16 * block_bytes)
    taken = span_of(worker.blocks(tokens) * worker.block_bytes + SEAL.size)
    assert 0 <= worker.kv_bytes(tokens) - taken <= 64


# Age


def test_nobody_takes_slot_or_memory_from_one_that_has_waited_long() -> None:
    view = view_of(p("p0", slots=2, adapters="ab"), d("d0"))
    prefill, decode = view.workers["p0"], view.workers["d0"]
    young, old = loaded_demand(), replace(loaded_demand("b"), order=WAITED_LONG)
    prefill.slot_for = WAITED_LONG
    assert isinstance(POLICY.place(young, view, NOW), Crowded)
    assert isinstance(POLICY.place(a_demand(""), view, NOW), Pair)  # needs no slot
    assert isinstance(POLICY.place(old, view, NOW), Pair)
    prefill.slot_for = (NOW - POLICY.patience / 2, 0, NOW - POLICY.patience / 2)  # hasn't waited long
    assert isinstance(POLICY.place(young, view, NOW), Pair)
    for one, refusal in ((decode, Refusal.NO_DECODE), (prefill, Refusal.NO_PREFILL)):
        one.memory_for = WAITED_LONG
        assert POLICY.place(young, view, NOW) is refusal
        assert isinstance(POLICY.place(old, view, NOW), Pair)
        one.memory_for = None


def test_a_worker_that_pauses_gets_nothing() -> None:
    for name, refusal in (("p0", Refusal.NO_PREFILL), ("d0", Refusal.NO_DECODE)):
        view = view_of(p("p0"), d("d0"))
        view.workers[name].paused_until = NOW + 1
        assert POLICY.place(a_demand(""), view, NOW) is refusal
        assert isinstance(POLICY.place(a_demand(""), view, NOW + 1), Pair)


# Adapters' places


def test_an_adapter_is_served_where_it_is() -> None:
    view = view_of(p("p0", adapters="b"), p("p1", adapters="ac"), p("p2"), d("d0"))
    assert place(view, a_demand("a")).prefill.id == "p1"
    assert place(view, a_demand("b")).prefill.id == "p0"
    fill(view, "p2", "new")
    assert place(view, a_demand("new")).prefill.id == "p2"


def test_a_busy_holder_is_left_for_the_least_loaded() -> None:
    view = view_of(p("p0", adapters="a"), p("p1"), d("d0"))
    fill(view, "p0", *"xxxx")
    assert place(view, a_demand("a")).prefill.id == "p0"
    fill(view, "p0", "x")
    assert place(view, a_demand("a")).prefill.id == "p1"


def test_other_routers_prompts_and_waiting_requests_are_load() -> None:
    for how in ("others", "long ones", "waiting"):
        view = view_of(p("p0", adapters="a"), p("p1"), d("d0"))
        if how == "others":
            view.workers["p0"].told(a_message("a", other_prompts=5))
        elif how == "long ones":
            view.workers["p0"].told(a_message("a", other_prompts=1, other_prompt_tokens=4 * WORK_TOKENS))
        else:
            view.workers["p0"].queue("x", 1, 5)
        assert look(view) == ("Absent", "p1")


def test_failed_workers_are_avoided_unless_alone() -> None:
    view = view_of(p("p0"), p("p1"), d("d0"), d("d1"))
    pair = place(view, replace(a_demand(), avoid=frozenset({"p0", "d1"})))
    assert (pair.prefill.id, decoder(pair)) == ("p1", "d0")
    assert place(view, replace(a_demand(), avoid=frozenset({"p0", "p1", "d0", "d1"}))).decode is not None


def test_stalled_workers_are_avoided_unless_alone() -> None:
    view = view_of(p("p0", stalled=9), p("p1"), d("d0"), d("d1", stalled=9))
    for digest in "abcdefgh":
        pair = place(view, a_demand(digest))
        assert (pair.prefill.id, decoder(pair)) == ("p1", "d0")
    failed = replace(a_demand(), avoid=frozenset({"p1", "d0"}))
    assert place(view, failed).prefill.id == "p1"  # a worker that failed works again more likely than a stalled one
    for one in ("p1", "d0"):
        view.workers[one].told(a_message(stalled_seconds=9))
    pair = place(view, failed)
    assert (pair.prefill.id, decoder(pair)) == ("p0", "d1")
    assert place(view, a_demand()).decode is not None
    view.workers["p0"].told(a_message())
    assert place(view, failed).prefill.id == "p0"


def test_an_adapter_of_a_stalled_worker_is_loaded_elsewhere() -> None:
    view = view_of(p("p0", stalled=9, adapters="a"), p("p1"), p("p2", stalled=9), d("d0"))
    assert look(view) == ("Absent", "p1")
    assert look(view, "b") == ("Absent", "p1")
    view.workers["p0"].told(a_message("a"))
    assert look(view) == ("Pair", "p0")


def test_a_new_worker_moves_few_adapters() -> None:
    some = [p(f"p{i}") for i in range(10)] + [d("d0")]
    digests = [f"digest-{i}" for i in range(500)]
    before, after = (
        {digest: place(view, a_demand(digest)).prefill.id for digest in digests}
        for view in (view_of(*some), view_of(*some, p("p10")))
    )
    moved = {digest for digest in digests if before[digest] != after[digest]}
    assert all(after[digest] == "p10" for digest in moved)
    assert 15 <= len(moved) <= 85
    assert min(Counter(before.values()).values()) >= 20


def test_a_thousand_workers() -> None:
    """400 prefill and 600 decode workers, 2,000 adapters with Zipf's popularity, requests that come and go."""
    draw, loads = random.Random(0), Counter[str]()
    members = [p(f"p{i}") for i in range(400)] + [d(f"d{i}", blocks=200, max_num_seqs=16) for i in range(600)]
    view = view_of(*members, max_prefills=16)
    popularity = [1 / rank for rank in range(1, 2001)]
    prefilling: list[Lease] = []
    decoding: list[Lease] = []
    asked: set[str] = set()
    for number in range(3000):
        digest = f"digest-{draw.choices(range(2000), popularity)[0]}"
        asked.add(digest)
        order = (NOW, number, NOW)
        demand = Demand(digest, draw.randint(1, 640), 0, adapter=ReadableRef(digest, digest, "/"), order=order)
        placed = POLICY.place(demand, view, NOW)
        if isinstance(placed, Absent):
            loads[digest] += 1
            placed.worker.load_ended(digest, NOW, done=True)
            placed = POLICY.place(demand, view, NOW)
        assert isinstance(placed, Pair)
        prefilling.append(Lease(placed, demand, [0], lambda worker: None))
        if len(prefilling) > 800:
            one = prefilling.pop(draw.randrange(len(prefilling)))
            one.prefill_ended()
            decoding.append(one)
        if len(decoding) > 1500:
            decoding.pop(draw.randrange(len(decoding))).release()
    blocks = sorted(view.workers[f"d{i}"].blocks.taken for i in range(600))
    assert max(view.workers[f"p{i}"].prefills for i in range(400)) <= 10  # two on average
    assert blocks[-1] - blocks[0] <= 80  # of 200, with requests of up to 40: memory is evenly used
    assert loads.total() < 1.5 * len(asked)  # most adapters stay in one place
    assert loads["digest-0"] > 5  # the hottest is spread
    for one in prefilling + decoding:
        one.release()
    assert all(one.idle for one in view.workers.values())


def test_the_hottest_adapters_load_is_bounded() -> None:
    """One adapter alone: its load spreads over all workers as it grows, within the promised bound."""
    for workers in (10, 40):
        view = view_of(*(p(f"p{i}") for i in range(workers)), d("d0", blocks=10**6), max_prefills=1000)
        for _ in range(20 * workers):
            place(view, a_demand()).prefill.add_prefill("a")
        loads = sorted(view.workers[f"p{i}"].prefills for i in range(workers))
        assert loads[-1] <= 2 * loads[0] + 5


def test_a_choice_and_a_message_cost_little_in_a_large_cluster() -> None:
    """1,000 prefill and 1,000 decode workers, 100,000 adapters. Five times faster where nothing else runs."""
    draw = random.Random(0)
    held = [[f"digest-{i}" for i in range(start, 100_000, 1000)] for start in range(1000)]
    view = view_of(
        *(p(f"p{i}", slots=16, adapters=digests, staging=100) for i, digests in enumerate(held)),
        *(d(f"d{i}", blocks=10_000, max_num_seqs=128, staging=100) for i in range(1000)),
        max_prefills=32,
    )
    places, tells, leases = list[float](), list[float](), list[Lease]()

    def timed(times: list[float], what: Any) -> Any:
        started = time.process_time()
        result = what()
        times.append(time.process_time() - started)
        return result

    for number in range(4000):
        hot = draw.random() < 0.2
        digest = "digest-0" if hot else f"digest-{draw.randrange(101_000)}"  # some are new
        demand = replace(loaded_demand(digest, tokens=draw.randint(16, 640)))
        placed = timed(places, lambda demand=demand: POLICY.place(demand, view, NOW))
        if isinstance(placed, Absent):
            placed.worker.load_ended(digest, NOW, done=True)
        elif isinstance(placed, Pair):
            leases.append(Lease(placed, demand, [0], lambda worker: None))
        if len(leases) > 3000:
            leases.pop(draw.randrange(len(leases))).release()
        update = a_message([f"digest-{draw.randrange(100_000)}"], whole=False, other_prompts=number % 3)
        timed(tells, lambda update=update: view.workers[f"p{draw.randrange(1000)}"].told(update))
    places.sort()
    assert median(places) < 5 * 0.3e-3
    assert places[int(0.99 * len(places))] < 5 * 1e-3
    assert median(tells) < 5 * 0.2e-3


# Adapters that aren't there yet, and slots


def test_a_cold_adapter_is_brought_in_where_it_will_be_served() -> None:
    view = view_of(*(p(f"p{i}") for i in range(4)), d("d0"))
    for digest in "abcdefgh":
        demand = loaded_demand(digest)
        home = POLICY.home(demand, view, NOW)
        assert home is not None
        assert look(view, digest) == ("Absent", home.id)
        home.load_begins(digest)
        assert POLICY.home(demand, view, NOW) is None
        assert look(view, digest) == ("Absent", home.id)
        home.load_ended(digest, NOW, done=True)
        assert POLICY.home(demand, view, NOW) is None
        assert look(view, digest) == ("Pair", home.id)
    assert POLICY.home(loaded_demand("x"), view_of(p("p0", adapters="x"), d("d0")), NOW) is None
    assert POLICY.home(loaded_demand("x"), view_of(d("d0")), NOW) is None


def test_nothing_is_brought_where_no_decode_worker_fits() -> None:
    view = view_of(*(p(f"p{i}", fingerprint="other") for i in range(7)), p("p9"), d("d0"))
    home = POLICY.home(loaded_demand(), view, NOW)
    assert home is not None
    assert home.id == "p9"
    assert look(view) == ("Absent", "p9")


def test_a_cold_adapter_comes_in_though_slots_and_prefills_are_full() -> None:
    view = view_of(p("p0", slots=1), d("d0"))
    fill(view, "p0", "x")
    assert look(view) == ("Absent", "p0")
    view = view_of(p("p0"), p("p1"), d("d0"))
    home = POLICY.home(loaded_demand(), view, NOW)
    assert home is not None
    fill(view, home.id, *"x" * 8)
    other = {"p0": "p1", "p1": "p0"}[home.id]
    fill(view, other, *"x" * 5)
    assert look(view) == ("Absent", other)  # it has room soonest
    fill(view, other, *"xxx")
    assert POLICY.place(loaded_demand(), view, NOW) is Refusal.NO_PREFILL
    assert POLICY.home(loaded_demand(), view, NOW) is home


def test_slots_full_of_others() -> None:
    view = view_of(p("p0", slots=2, adapters="abc"), d("d0"))
    one = view.workers["p0"]
    fill(view, "p0", "b", "c", "c", "")
    assert look(view) == ("Crowded", "p0")
    assert look(view, "b") == ("Pair", "p0")  # shares the slot
    assert place(view, a_demand("")) == Pair(one, view.workers["d0"])
    one.drop_prompt("c")
    assert look(view) == ("Crowded", "p0")
    one.drop_prompt("c")  # though its KV is still on its way
    assert look(view) == ("Pair", "p0")
    one.slot_for = WAITED_LONG
    assert look(view) == look(view, "b") == ("Crowded", "p0")
    assert place(view, a_demand(""))
    one.slot_for = None
    one.is_full = True  # of other routers' prompts: the worker has said so, and told nothing since
    assert look(view) == ("Crowded", "p0")
    assert look(view, "b") == ("Pair", "p0")
    one.told(a_message("abc"))
    assert look(view) == ("Pair", "p0")
    one.told(a_message("abc", others={"c": 1}))
    assert look(view) == ("Crowded", "p0")
    assert look(view, "c") == ("Pair", "p0")


def test_of_two_holders_the_one_with_a_free_slot_is_taken() -> None:
    for full, free in (("p0", "p1"), ("p1", "p0")):
        view = view_of(p("p0", slots=1, adapters="a"), p("p1", slots=1, adapters="a"), d("d0"))
        fill(view, full, "x")
        fill(view, free, "", "", "")  # busier, but within the bound
        assert look(view) == ("Pair", free)
        view.workers[free].slot_for = WAITED_LONG
        assert look(view)[0] == "Crowded"


def test_a_much_busier_holder_loses_to_a_worker_that_loads_the_adapter_first() -> None:
    view = view_of(p("p0", adapters="a"), p("p1"), d("d0"))
    fill(view, "p0", *"xxxx")
    assert look(view) == ("Pair", "p0")
    fill(view, "p0", "x")
    assert look(view) == ("Absent", "p1")
    view.workers["p1"].load_begins("a")
    assert look(view) == ("Absent", "p1")
    view.workers["p1"].load_ended("a", NOW, done=True)
    assert look(view) == ("Pair", "p1")


def test_who_has_the_adapter_doesnt_wait_for_anothers_load() -> None:
    """A copy that is on its way to an idle worker holds nobody up."""
    view = view_of(p("p0"), p("p1", adapters="a", running=3), d("d0"))
    view.workers["p0"].load_begins("a")
    assert look(view) == ("Pair", "p1")
    fill(view, "p1", *"xxxx")
    assert look(view) == ("Pair", "p1")
    fill(view, "p1", "x")
    assert look(view) == ("Absent", "p0")


def test_who_came_before_another_router_s_prompts_shares_their_slot_though_it_is_kept() -> None:
    """So requests of one adapter go together that wait at several routers, as do those of one router."""
    view = view_of(p("p0", adapters="ab", slots=1), d("d0"))
    worker = view.workers["p0"]
    worker.slot_for = WAITED_LONG
    assert look(view) == ("Crowded", "p0")
    others = AdapterStatus(AdapterState.SLOT, other_prompts=1)
    worker.told(StatusUpdate(WorkerStatus(), {"a": others}), JUST_CAME[2])
    assert look(view) == ("Crowded", "p0")  # came at that moment
    worker.told(StatusUpdate(WorkerStatus(), {"a": AdapterStatus(AdapterState.HOST)}), NOW + 1)
    worker.told(StatusUpdate(WorkerStatus(), {"a": others}), NOW + 2)
    assert look(view) == ("Pair", "p0")
    assert look(view, "b") == ("Crowded", "p0")
    fill(view, "p0", "a")  # this router's own prompt, and others' end: nobody keeps the slot for ever by taking turns
    worker.told(StatusUpdate(WorkerStatus(), {"a": AdapterStatus(AdapterState.SLOT)}), NOW + 3)
    assert worker.slot_shared("a") == NOW + 2
    worker.told(StatusUpdate(WorkerStatus(), {"a": others}), NOW + 4)
    assert worker.slot_shared("a") == NOW + 2
    worker.told(StatusUpdate(WorkerStatus(), {"a": AdapterStatus(AdapterState.SLOT)}), NOW + 5)
    worker.drop_prompt("a")
    assert look(view) == ("Crowded", "p0")


def test_another_router_s_request_is_overtaken_by_twice_the_patience_at_most() -> None:
    view = view_of(p("p0", adapters="ab", slots=1), d("d0"))
    for waited, seen in ((0.0, "Pair"), (1.9 * POLICY.patience, "Pair"), (2.1 * POLICY.patience, "Crowded")):
        view.workers["p0"].told(StatusUpdate(WorkerStatus(other_slot_wait_ms=int(1000 * waited))), NOW)
        assert look(view) == (seen, "p0")
    old = replace(loaded_demand(), order=WAITED_LONG)
    assert isinstance(POLICY.place(old, view, NOW), Pair)  # older than the other one
    assert place(view, a_demand("")).prefill.id == "p0"  # needs no slot


def test_who_came_before_an_own_prompt_does_not_share_a_slot_that_is_kept() -> None:
    view = view_of(p("p0", adapters="a", slots=1), d("d0"))
    fill(view, "p0", "a")
    view.workers["p0"].slot_for = WAITED_LONG
    view.workers["p0"].told(StatusUpdate(WorkerStatus(), {"a": AdapterStatus(AdapterState.SLOT, 1)}), NOW + 1)
    assert look(view) == ("Crowded", "p0")


def test_a_second_copy_goes_where_one_is_on_its_way_already() -> None:
    view = view_of(p("p0", adapters="a"), p("p1"), p("p2", running=1), d("d0"))
    fill(view, "p0", *"xxxxx")
    view.workers["p2"].load_begins("a")
    assert look(view) == ("Absent", "p2")


def test_a_worker_that_refused_is_not_asked_for_a_copy() -> None:
    view = view_of(p("p0", adapters="a"), p("p1"), p("p2"), d("d0"))
    fill(view, "p0", *"xxxxx")
    view.workers["p1"].load_ended("a", NOW, done=False)
    assert look(view) == ("Absent", "p2")
    view.workers["p2"].load_ended("a", NOW, done=False)
    assert look(view) == ("Pair", "p0")
    fill(view, "p0", *"xxx")
    assert look(view) == ("Crowded", "p0")


def test_a_full_holder_is_waited_for_unless_others_have_much_room() -> None:
    """When all workers are full, each place that becomes free would fetch another worker's adapters otherwise."""
    view = view_of(p("p0", adapters="a"), p("p1"), d("d0"))
    fill(view, "p0", *"x" * 8)
    fill(view, "p1", *"x" * 7)
    assert look(view) == ("Crowded", "p0")
    assert place(view, a_demand(""))
    for _ in range(4):
        view.workers["p1"].drop_prompt("x")
        view.workers["p1"].drop_prefill()
    assert look(view) == ("Absent", "p1")


def test_a_copy_goes_where_a_slot_is() -> None:
    view = view_of(p("p0", adapters="a"), p("p1", slots=1), p("p2", slots=1), d("d0"))
    fill(view, "p0", *"xxxxxxx")
    fill(view, "p1", "x")
    fill(view, "p2", "")
    view.workers["p1"].drop_prefill()  # its prompt isn't computed, so its slot is taken: the least busy all the same
    assert look(view) == ("Absent", "p2")


def test_a_message_that_an_adapter_is_gone_is_believed() -> None:
    view = view_of(p("p0"), d("d0"))
    view.workers["p0"].load_ended("a", NOW, done=True)
    for _ in range(3):
        assert look(view) == ("Pair", "p0")
        view.workers["p0"].told(a_message(whole=False))
    view.workers["p0"].told(gone("a"))
    assert look(view) == ("Absent", "p0")
