"""The queue: who is next, who is turned away, and that leaving it leaves nothing behind."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from preft.router.ledger import Ledger

from preft.core.cluster import REGION_BYTES, ClusterSnapshot, Role, Worker, WorkerLoad, WorkerState
from preft.core.errors import (
    DeadlineExceeded,
    InvalidAdapter,
    InvalidRequest,
    PreftError,
    QueueFull,
    SourceNotFound,
    Unavailable,
)
from preft.router import admission as admission_module
from preft.router.admission import Admission, Ticket
from preft.router.lease import Lease
from preft.router.policy import AffinityPolicy, Demand, Roster
from support.readable_ref import ReadableRef

BLOCK_BYTES = 1000


def a_worker(worker_id: str, role: Role, blocks: int = 10) -> Worker:
    load = WorkerLoad(kv_blocks_total=blocks, kv_blocks_free=blocks)
    return Worker(worker_id, role, WorkerState.READY, "h:1", "f", 1, load=load)


def roster_of(decode: int = 1, blocks: int = 10) -> Roster:
    workers = [a_worker("p0", Role.PREFILL), *(a_worker(f"d{i}", Role.DECODE, blocks) for i in range(decode))]
    return Roster.of(ClusterSnapshot({worker.id: worker for worker in workers}))


def an_admission(roster: Roster | None, max_queue: int = 100, prefills: int = 100, grace: float = 0.1) -> Admission:
    admission = Admission(AffinityPolicy(prefills), Ledger(), max_queue, grace, lambda worker, adapter: None)
    admission.update(roster or Roster((), {}, {}))
    return admission


def enter(admission: Admission, blocks: int = 10, digest: str = "a", **options: object) -> Ticket:
    demand = Demand(digest, kv_tokens=blocks * 16, max_tokens=blocks * 16)
    return admission.enter(demand, [0], since=asyncio.get_running_loop().time(), **options)  # type: ignore[arg-type]


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def served(*tickets: Ticket) -> list[bool]:
    return [ticket.outcome.done() for ticket in tickets]


async def test_room_is_given_at_once() -> None:
    admission = an_admission(roster_of())
    ticket = enter(admission)
    lease = await ticket.wait(1)
    assert lease.decode is not None
    assert admission.waiting == 0
    lease.release()
    assert admission._ledger.idle


async def test_an_adapters_requests_are_served_in_their_order() -> None:
    admission = an_admission(roster_of())
    first, *rest = [enter(admission) for _ in range(4)]
    assert served(*rest) == [False] * 3
    for i in range(3):
        (await (first if i == 0 else rest[i - 1]).wait(1)).release()
        await settle()
        assert served(*rest) == [True] * (i + 1) + [False] * (2 - i)


async def test_the_oldest_of_all_adapters_is_next() -> None:
    admission = an_admission(roster_of())
    running = enter(admission, digest="x")
    waiting = [enter(admission, digest=digest) for digest in "bacab"]
    (await running.wait(1)).release()
    await settle()
    for i, ticket in enumerate(waiting):
        assert served(*waiting) == [True] * (i + 1) + [False] * (4 - i)
        (await ticket.wait(1)).release()
        await settle()
    assert admission._ledger.idle


async def test_a_big_request_doesnt_hold_up_others() -> None:
    admission = an_admission(roster_of())
    running = enter(admission, blocks=6)
    big, small = enter(admission, blocks=8, digest="big"), enter(admission, blocks=4, digest="small")
    assert served(big, small) == [False, True]
    (await running.wait(1)).release()
    (await small.wait(1)).release()
    await settle()
    assert served(big) == [True]


async def test_small_requests_in_the_queue_pass_a_big_one() -> None:
    admission = an_admission(roster_of())
    running = [enter(admission, blocks=5) for _ in range(2)]
    big, small = enter(admission, blocks=8, digest="big"), enter(admission, blocks=4, digest="small")
    assert served(big, small) == [False, False]
    (await running[0].wait(1)).release()
    await settle()
    assert served(big, small) == [False, True]


async def test_a_big_request_isnt_starved_by_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission_module, "PATIENCE", 0.05)
    admission = an_admission(roster_of(decode=2))
    running = [enter(admission, blocks=5, digest=f"r{i}") for i in range(4)]
    big = enter(admission, blocks=10, digest="big")
    await asyncio.sleep(0.1)
    (await running[0].wait(1)).release()
    await settle()
    assert served(enter(admission, blocks=5, digest="s")) == [False]  # the room is kept
    (await running[1].wait(1)).release()
    (await running[2].wait(1)).release()
    await settle()
    assert admission.waiting <= 1
    (await running[3].wait(1)).release()
    await settle()
    assert served(big) == [True]


def staging_roster(prompts: int = 2) -> Roster:
    """Staging memory for so many prompts of one block, on each side."""
    workers = [a_worker("p0", Role.PREFILL), a_worker("d0", Role.DECODE, 1000)]
    load = {"staging_bytes_total": prompts * (BLOCK_BYTES + REGION_BYTES)}
    workers = [replace(worker, block_bytes=BLOCK_BYTES, load=replace(worker.load, **load)) for worker in workers]
    return Roster.of(ClusterSnapshot({worker.id: worker for worker in workers}))


def enter_prompt(admission: Admission, blocks: int, digest: str = "") -> Ticket:
    demand = Demand(digest, blocks * 16, blocks * 16, prompt_tokens=blocks * 16)
    return admission.enter(demand, [0], since=asyncio.get_running_loop().time())


async def test_staging_memory_holds_the_queue() -> None:
    """What has no room waits here, not on a worker; a smaller prompt may pass."""
    admission = an_admission(staging_roster(3))
    running = [enter_prompt(admission, 1) for _ in range(2)]
    big, small = enter_prompt(admission, 2, "big"), enter_prompt(admission, 1, "small")
    assert served(*running, big, small) == [True, True, False, True]
    (await running[0].wait(1)).prefill_ended()
    (await small.wait(1)).prefill_ended()
    await settle()
    assert served(big) == [False]  # it has room for its prefill, and none yet where its KV goes
    (await running[0].wait(1)).kv_loaded(0)
    (await small.wait(1)).kv_loaded(0)
    await settle()
    assert served(big) == [True]


@pytest.mark.parametrize("side", ["prefill", "decode"])
async def test_a_long_prompt_isnt_starved_of_staging_memory(monkeypatch: pytest.MonkeyPatch, side: str) -> None:
    monkeypatch.setattr(admission_module, "PATIENCE", 0.05)
    admission = an_admission(staging_roster())
    running = [await enter_prompt(admission, 1).wait(1) for _ in range(2)]
    if side == "decode":
        for lease in running:
            lease.prefill_ended()
    big = enter_prompt(admission, 2, "")
    await asyncio.sleep(0.1)
    running[0].release()
    await settle()
    assert served(enter_prompt(admission, 1, "")) == [False]  # the room is kept
    running[1].release()
    await settle()
    assert served(big) == [True]


@pytest.mark.parametrize(("role", "setting"), [(Role.PREFILL, "prefill"), (Role.DECODE, "decode")])
async def test_a_prompt_that_never_fits_is_refused_by_the_settings_name(role: Role, setting: str) -> None:
    small, large = staging_roster(2), staging_roster(9)
    roster = replace(large, prefill=small.prefill) if role is Role.PREFILL else replace(large, decode=small.decode)
    admission = an_admission(roster)
    enter_prompt(admission, 2)
    with pytest.raises(InvalidRequest, match=rf"a prompt of 48 tokens doesn't fit .* raise {setting}\.staging_bytes$"):
        enter_prompt(admission, 3)
    sends_nothing = Demand("", 48, 48, prompt_tokens=48, decodes=False)
    assert served(admission.enter(sends_nothing, [0], since=0.0)) == [True]


async def test_leaving_gives_up_the_room_that_was_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission_module, "PATIENCE", 0.0)
    admission = an_admission(roster_of())
    running = enter(admission, blocks=5)
    big = enter(admission, blocks=10, digest="big")
    await asyncio.sleep(0.01)
    admission.wake()
    await settle()
    small = enter(admission, blocks=5, digest="small")
    assert served(small) == [False]
    big.cancel()
    await settle()
    assert served(small) == [True]
    assert served(enter(admission, blocks=6, digest="third")) == [False]
    (await running.wait(1)).release()


async def test_the_last_to_leave_gives_up_the_room_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission_module, "PATIENCE", 0.0)
    admission = an_admission(roster_of())
    running = enter(admission, blocks=5)
    big = enter(admission, blocks=10, digest="big")
    await asyncio.sleep(0.01)
    admission.wake()
    await settle()
    big.cancel()
    assert served(running, enter(admission, blocks=5, digest="small")) == [True, True]


async def test_a_full_queue() -> None:
    admission = an_admission(roster_of(), max_queue=2)
    tickets = [enter(admission) for _ in range(3)]
    with pytest.raises(QueueFull) as caught:
        enter(admission, digest="b")
    assert 1 <= caught.value.retry_after <= 30
    assert admission.waiting == 2
    again = enter(admission, started=True)  # it has begun: never turned away, and first of its adapter
    (await tickets[0].wait(1)).release()
    await settle()
    assert served(tickets[1], again) == [False, True]


async def test_leaving_the_queue_makes_room() -> None:
    admission = an_admission(roster_of(), max_queue=1)
    enter(admission)
    waiting = enter(admission)
    waiting.cancel()
    waiting.cancel()
    assert admission.waiting == 0
    assert served(enter(admission)) == [False]


async def test_a_deadline_in_the_queue() -> None:
    admission = an_admission(roster_of())
    enter(admission)
    with pytest.raises(DeadlineExceeded):
        await enter(admission).wait(0.01)
    assert admission.waiting == 0


async def test_cancelled_in_the_instant_of_being_served() -> None:
    admission = an_admission(roster_of())
    running = await enter(admission).wait(1)
    ticket = enter(admission)
    waiting = asyncio.create_task(ticket.wait(1))
    await settle()
    running.release()
    waiting.cancel()  # the queue is looked through before the task knows
    await asyncio.gather(waiting, return_exceptions=True)
    await settle()
    assert admission._ledger.idle

    running = await enter(admission).wait(1)
    ticket = enter(admission)
    waiting = asyncio.create_task(ticket.wait(1))
    await settle()
    running.release()
    asyncio.get_running_loop().call_soon(waiting.cancel)  # served, but the task doesn't know yet
    await asyncio.gather(waiting, return_exceptions=True)
    await settle()
    assert admission._ledger.idle


async def test_a_lease_nobody_took_is_given_back() -> None:
    admission = an_admission(roster_of())
    enter(admission).cancel()
    assert admission._ledger.idle


async def test_what_fits_nowhere_is_refused_at_once() -> None:
    admission = an_admission(roster_of(decode=2))
    with pytest.raises(InvalidRequest, match="176 tokens, no decode worker holds more than 160") as caught:
        enter(admission, blocks=11)
    assert caught.value.param == "max_tokens"
    with pytest.raises(InvalidRequest, match="3 choices") as caught:
        admission.enter(Demand("a", 64, 64, choices=3), [0, 1, 2], since=0.0)
    assert caught.value.param == "n"
    assert admission._ledger.idle
    assert served(admission.enter(Demand("a", 9999, 9999, decodes=False), [0], since=0.0)) == [True]


async def test_without_workers_new_requests_are_refused_and_begun_ones_wait() -> None:
    admission = an_admission(None, grace=0.1)
    with pytest.raises(Unavailable):
        enter(admission)
    admission.update(roster_of())
    running = enter(admission)
    waiting = enter(admission)
    admission.update(Roster((), {}, {}))
    begun = enter(admission, started=True)
    assert served(waiting, begun) == [False, False]
    await asyncio.sleep(0.05)
    (await running.wait(1)).release()
    admission.update(roster_of())
    await settle()
    assert served(waiting, begun) == [False, True]
    (await begun.wait(1)).release()
    await settle()
    assert served(waiting) == [True]


async def test_workers_that_dont_come_back_end_the_waiting() -> None:
    admission = an_admission(roster_of(), grace=0.02)
    enter(admission)
    waiting = enter(admission)
    admission.update(Roster((), {}, {}))
    await asyncio.sleep(0.05)
    admission.update(Roster((), {}, {}))
    with pytest.raises(Unavailable):
        await waiting.wait(1)
    assert admission.waiting == 0


async def test_new_workers_are_used_at_once() -> None:
    admission = an_admission(roster_of(decode=1))
    tickets = [enter(admission) for _ in range(3)]
    admission.update(roster_of(decode=3))
    await settle()
    assert served(*tickets) == [True] * 3


async def test_prefill_limits_hold_the_queue() -> None:
    admission = an_admission(roster_of(blocks=1000), prefills=2)
    tickets = [enter(admission, blocks=1, digest=f"a{i}") for i in range(4)]
    assert served(*tickets) == [True, True, False, False]
    (await tickets[0].wait(1)).prefill_ended()
    await settle()
    assert served(*tickets) == [True, True, True, False]


async def test_closing_turns_everything_away() -> None:
    admission = an_admission(roster_of())
    enter(admission)
    waiting = enter(admission)
    admission.close(Unavailable("the server is shutting down"))
    admission.update(roster_of())  # what is still heard of workers opens nothing again
    with pytest.raises(Unavailable, match="shutting down"):
        await waiting.wait(1)
    for started in (False, True):
        with pytest.raises(Unavailable, match="shutting down"):
            enter(admission, started=started)


async def test_a_long_queue_is_looked_through_quickly() -> None:
    """A thousand adapters wait for one full cluster: each release costs one look, not a thousand choices."""
    admission = an_admission(roster_of(decode=4), max_queue=2000)
    running = [enter(admission, digest=f"r{i}") for i in range(4)]
    waiting = [enter(admission, digest=f"w{i}") for i in range(1000)]
    choices = 0
    place = admission._policy.place

    class Counting:
        def place(self, *arguments: object) -> object:
            nonlocal choices
            choices += 1
            return place(*arguments)  # type: ignore[arg-type]

    admission._policy = Counting()  # type: ignore[assignment]
    (await running[0].wait(1)).release()
    await settle()
    assert served(waiting[0]) == [True]
    assert choices == 2


# Adapters that come in while their requests wait, and slots


class Cluster:
    """An admission over prefill workers whose loads end when the test says so. Decode has room without end."""

    def __init__(
        self,
        held: dict[str, str],
        slots: int = 0,
        prefills: int = 100,
        max_queue: int = 100,
        decode_blocks: int = 10**6,
    ) -> None:
        """`held`: worker id -> the adapters in its memory, a letter each."""
        self.held = {worker: set(digests) for worker, digests in held.items()}
        self.slots, self.decode_blocks = slots, decode_blocks
        self.up = set(self.held)
        self.beats = 0.0
        self.ledger = Ledger()
        self.asked: list[tuple[str, str]] = []  # (worker, digest) in the order of the calls
        self.admission = Admission(AffinityPolicy(prefills), self.ledger, max_queue, 60.0, self.prefetch)
        self.beat()

    def prefetch(self, worker: Worker, adapter: ReadableRef) -> None:
        if not self.ledger.loading(worker.id, adapter.digest):
            assert worker.id in self.up
            self.ledger.load_begins(worker.id, adapter.digest)
            self.asked.append((worker.id, adapter.digest))

    @property
    def loading(self) -> list[tuple[str, str]]:
        return [load for load in dict.fromkeys(self.asked) if self.ledger.loading(*load)]

    def load_ends(self, worker: str, digest: str, error: PreftError | None = None, lost: bool = False) -> None:
        done = error is None and not lost
        if done:
            self.held[worker].add(digest)
        self.ledger.load_ended(worker, digest, done=done)
        self.admission.load_ended(digest, error)

    def beat(self) -> None:
        """Heartbeats of all workers that are up, polled."""
        self.beats += 1
        members = [
            Worker(name, Role.PREFILL, WorkerState.READY, "h:1", "f", 1, heartbeat=self.beats,
                   adapter_slots=self.slots, load=WorkerLoad(adapters=tuple(sorted(self.held[name]))))
            for name in sorted(self.up)
        ]  # fmt: skip
        members.append(a_worker("d0", Role.DECODE, self.decode_blocks))
        self.ledger.observe(members)
        self.admission.update(Roster.of(ClusterSnapshot({worker.id: worker for worker in members})))

    def enter(self, digest: str, blocks: int = 1, age: float = 0.0, **options: Any) -> Ticket:
        adapter = ReadableRef(digest, digest, "/") if digest else None
        demand = Demand(digest, blocks * 16, blocks * 16, adapter=adapter)
        return self.admission.enter(demand, [0], since=asyncio.get_running_loop().time() - age, **options)

    @property
    def untouched(self) -> bool:
        """No room is reserved, no slot is taken."""
        return self.ledger.idle and not self.ledger.distinct_adapters("p0")


async def test_a_cold_adapters_requests_hold_nothing_while_it_loads() -> None:
    cluster = Cluster({"p0": "b"}, slots=1, prefills=1, decode_blocks=10)
    cold = [cluster.enter("a", blocks=10) for _ in range(5)]
    assert cluster.untouched
    assert cluster.asked == [("p0", "a")]
    for digest in ("b", "", "b"):  # the only slot, prefill and decode room are theirs
        lease = await cluster.enter(digest, blocks=10).wait(1)
        await settle()
        lease.release()
    cluster.beat()
    await settle()
    assert served(*cold) == [False] * 5
    cluster.load_ends("p0", "a")
    for i in range(5):
        await settle()
        assert served(*cold) == [True] * (i + 1) + [False] * (4 - i)
        lease = await cold[i].wait(1)
        assert lease.prefill.id == "p0"
        lease.release()
    assert cluster.asked == [("p0", "a")]
    assert cluster.untouched


async def test_who_comes_while_an_adapter_loads_waits_behind_the_others() -> None:
    cluster = Cluster({"p0": ""}, prefills=1)
    first = cluster.enter("a")
    second = cluster.enter("a")
    again = cluster.enter("a", started=True, age=1.0)
    [load] = cluster.asked
    cluster.load_ends(*load)
    third = cluster.enter("a")  # in the instant of its end
    order = [again, first, second, third]
    for i in range(4):
        await settle()
        assert served(*order) == [True] * (i + 1) + [False] * (3 - i)
        (await order[i].wait(1)).release()
    assert cluster.asked == [load]


@pytest.mark.parametrize("full", ["prefill", "decode", "slots"])
async def test_an_adapter_comes_in_while_its_request_waits_for_something_else(full: str) -> None:
    cluster = Cluster({"p0": "b"}, slots=1 if full == "slots" else 0, prefills=1 if full == "prefill" else 9,
                      decode_blocks=1 if full == "decode" else 10**6)  # fmt: skip
    running = await cluster.enter("b").wait(1)
    cold = [cluster.enter("a") for _ in range(3)]
    assert cluster.asked == [("p0", "a")]
    cluster.load_ends("p0", "a")
    await settle()
    assert served(*cold) == [False] * 3
    assert cluster.asked == [("p0", "a")]
    running.release()
    await settle()
    assert served(cold[0]) == [True]
    assert cluster.asked == [("p0", "a")]


async def test_what_some_worker_has_or_loads_isnt_asked_for_again() -> None:
    cluster = Cluster({"p0": "a", "p1": ""}, prefills=1)
    for _ in range(2):
        cluster.enter("")  # both are full
    cluster.enter("a")
    assert cluster.asked == []
    cold = cluster.enter("c")
    cluster.enter("c")
    assert len(cluster.asked) == 1
    cold.cancel()
    cluster.enter("c")
    assert len(cluster.asked) == 1


@pytest.mark.parametrize("error", [InvalidAdapter("broken"), SourceNotFound("nothing there"), Unavailable("no room")])
async def test_a_refused_load_is_the_answer_to_all_who_wait_for_it(error: PreftError) -> None:
    cluster = Cluster({"p0": "", "p1": ""}, max_queue=6)
    refused = [cluster.enter("a") for _ in range(3)]
    others = [cluster.enter("c") for _ in range(3)]
    refused[1].cancel()
    assert cluster.admission.waiting == 5
    where = dict((digest, worker) for worker, digest in cluster.asked)
    cluster.load_ends(where["a"], "a", error)
    for ticket in (refused[0], refused[2]):
        with pytest.raises(type(error), match=str(error)):
            await ticket.wait(1)
        ticket.cancel()
    await settle()
    assert served(*others) == [False] * 3
    assert cluster.admission.waiting == 3
    again = [cluster.enter("a") for _ in range(3)]  # there is room in the queue for them
    assert cluster.asked.count((where["a"], "a")) == 2
    cluster.load_ends(where["a"], "a")
    cluster.load_ends(where["c"], "c")
    await settle()
    assert served(*again, *others) == [True] * 6
    assert cluster.admission.waiting == 0


async def test_a_load_that_ends_when_nobody_waits_any_more() -> None:
    cluster = Cluster({"p0": ""})
    for error in (None, Unavailable("no room")):
        ticket = cluster.enter("a" if error else "b")
        waiting = asyncio.create_task(ticket.wait(1))
        await settle()
        waiting.cancel()  # it is still in the queue when the load ends
        cluster.load_ends("p0", ticket.demand.digest, error)
        await asyncio.gather(waiting, return_exceptions=True)
        await settle()
        assert cluster.admission.waiting == 0
        assert cluster.untouched
        assert not cluster.admission._pump_due


async def test_another_worker_is_asked_when_the_loading_one_is_lost() -> None:
    cluster = Cluster({"p0": "", "p1": ""})
    tickets = [cluster.enter("a") for _ in range(3)]
    [(lost, _)] = cluster.asked
    cluster.up.remove(lost)
    cluster.beat()
    cluster.load_ends(lost, "a", lost=True)
    await settle()
    assert served(*tickets) == [False] * 3
    (other,) = cluster.up
    assert cluster.asked == [(lost, "a"), (other, "a")]
    cluster.load_ends(other, "a")
    await settle()
    assert served(*tickets) == [True] * 3
    assert {(await ticket.wait(1)).prefill.id for ticket in tickets} == {other}


async def test_the_only_worker_is_asked_again_when_it_is_back() -> None:
    cluster = Cluster({"p0": ""})
    ticket = cluster.enter("a")
    cluster.up.clear()
    cluster.beat()
    cluster.load_ends("p0", "a", lost=True)
    await settle()
    cluster.up.add("p0")
    cluster.beat()
    await settle()
    assert cluster.asked == [("p0", "a")] * 2
    cluster.load_ends("p0", "a")
    await settle()
    assert served(ticket) == [True]


async def test_a_failed_copy_is_nobodys_error_while_another_worker_has_the_adapter() -> None:
    """The holder is much busier, but it is there; and the worker that refused isn't asked over and over."""
    cluster = Cluster({"p0": "a", "p1": ""}, prefills=8)
    running = [await cluster.enter("a").wait(1) for _ in range(5)]
    waiting = [cluster.enter("a") for _ in range(2)]
    assert cluster.asked == [("p1", "a")]
    cluster.load_ends("p1", "a", SourceNotFound("nothing there any more"))
    await settle()
    assert served(*waiting) == [True] * 2
    assert {(await ticket.wait(1)).prefill.id for ticket in waiting} == {"p0"}
    running += [await cluster.enter("a").wait(1)]
    late = cluster.enter("a")
    assert served(late) == [False]  # it is full
    running[0].release()
    await settle()
    assert served(late) == [True]
    assert cluster.asked == [("p1", "a")]


async def test_a_failed_copy_is_the_error_of_one_whom_the_holder_has_failed() -> None:
    cluster = Cluster({"p0": "a", "p1": ""}, prefills=1)
    running = await cluster.enter("a").wait(1)
    again = cluster.enter("a", started=True, avoid=frozenset({"p0"}))
    other = cluster.enter("a")
    assert cluster.asked == [("p1", "a")]
    cluster.load_ends("p1", "a", Unavailable("no room"))
    with pytest.raises(Unavailable, match="no room"):
        await again.wait(1)
    await settle()
    running.release()
    await settle()
    assert served(other) == [True]
    assert cluster.asked == [("p1", "a")]


async def test_a_resident_adapter_isnt_held_up_by_its_copys_load() -> None:
    cluster = Cluster({"p0": "a", "p1": ""}, prefills=8)
    running = [await cluster.enter("a").wait(1) for _ in range(5)]
    waiting = cluster.enter("a")
    assert cluster.asked == [("p1", "a")]
    assert served(waiting) == [False]
    running[0].release()
    await settle()
    assert served(waiting) == [True]
    assert cluster.loading == [("p1", "a")]


async def test_an_adapter_that_is_evicted_at_once_or_never_listed_is_served() -> None:
    """The load's end counts as presence for a few heartbeats: no endless asking."""
    cluster = Cluster({"p0": ""})
    for _ in range(3):
        ticket = cluster.enter("a")
        cluster.load_ends("p0", "a")
        cluster.held["p0"].clear()
        cluster.beat()
        await settle()
        (await ticket.wait(1)).release()
        for _ in range(4):
            cluster.beat()
        await settle()
    assert cluster.asked == [("p0", "a")] * 3


async def test_waiting_adapters_get_slots_in_the_order_in_which_they_came() -> None:
    cluster = Cluster({"p0": "abcdefgh"}, slots=2)
    running = {digest: await cluster.enter(digest).wait(1) for digest in "ab"}
    waiting = {digest: cluster.enter(digest) for digest in "hcgdfe"}
    await settle()
    order = list("hcgdfe")
    for i, digest in enumerate(["a", "b", "h", "c", "g", "d"]):
        lease = running.pop(digest)
        lease.prompt_ended()  # not the prefill: its KV is still on its way
        newcomer = cluster.enter("a")  # just as the slot has become free
        newcomer.cancel()
        await settle()
        assert served(*(waiting[each] for each in order)) == [True] * (i + 1) + [False] * (5 - i)
        running[order[i]] = await waiting[order[i]].wait(1)
    assert cluster.asked == []


async def test_base_requests_need_no_slot_and_an_adapters_requests_share_one() -> None:
    cluster = Cluster({"p0": "ab"}, slots=1)
    tickets = [cluster.enter(digest) for digest in ("a", "", "b", "a", "", "b")]
    assert served(*tickets) == [True, True, False, True, True, False]
    (await tickets[0].wait(1)).release()
    await settle()
    assert served(tickets[2]) == [False]
    (await tickets[3].wait(1)).prompt_ended()
    await settle()
    assert served(*tickets) == [True] * 6


async def test_busy_adapters_dont_starve_one_that_waits_for_their_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    """`a` always has a prompt in the only slot of p0. After SLOT_PATIENCE it gets no more, and only there."""
    monkeypatch.setattr(admission_module, "SLOT_PATIENCE", 0.1)
    cluster = Cluster({"p0": "ab", "p1": "c"}, slots=1)
    loop = asyncio.get_running_loop()
    running = [await cluster.enter("a").wait(1)]
    begun, waiting = loop.time(), cluster.enter("b")
    late: list[Ticket] = []
    while not waiting.outcome.done():
        assert loop.time() - begun < 1.0
        newcomer = cluster.enter("a")
        if newcomer.outcome.done():
            running.append(await newcomer.wait(1))
        else:
            late.append(newcomer)
        base, other = cluster.enter(""), cluster.enter("c")
        assert served(base, other) == [True, True]
        (await other.wait(1)).release()
        await asyncio.sleep(0.01)
        if running:
            running.pop(0).release()
        await settle()
    assert loop.time() - begun >= 0.1
    assert late
    assert not any(served(*late))
    (await waiting.wait(1)).release()
    await settle()
    assert all(served(*late))


@pytest.mark.parametrize("end", ["cancelled", "refused", "no workers"])
async def test_slots_that_were_kept_are_free_again(end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However the request ends for which they were kept; without waiting for the next heartbeat."""
    cluster = Cluster({"p0": "ab"}, slots=1)
    running = await cluster.enter("a").wait(1)
    old = cluster.enter("b", age=99.0)
    cluster.admission.wake()
    await settle()
    assert cluster.ledger.slots_kept("p0")
    if end == "cancelled":
        old.cancel()
    elif end == "refused":
        cluster.held["p0"].remove("b")
        cluster.admission._roster = Roster(cluster.admission.roster.prefill, cluster.admission.roster.decode, {})
        cluster.load_ends("p0", "b", Unavailable("no room"))
        with pytest.raises(Unavailable):
            await old.wait(1)
        cluster.beat()
    else:
        monkeypatch.setattr(cluster.admission, "_restart_grace", -1.0)
        cluster.admission.update(Roster((), {}, {}))
        with pytest.raises(Unavailable):
            await old.wait(1)
        cluster.beat()
    assert served(cluster.enter("a")) == [True]
    running.release()


async def test_a_cold_adapter_keeps_no_slots_while_it_loads() -> None:
    cluster = Cluster({"p0": "a"}, slots=1)
    running = [await cluster.enter("a").wait(1)]
    cold = cluster.enter("b", age=99.0)
    for _ in range(3):
        cluster.admission.wake()
        await settle()
        running.append(await cluster.enter("a").wait(1))
    cluster.load_ends("p0", "b")
    await settle()
    assert served(late := cluster.enter("a"), cold) == [False, False]  # now they are kept
    for lease in running:
        lease.release()
    await settle()
    assert served(late, cold) == [False, True]


async def test_waiting_for_one_workers_slots_doesnt_hold_up_anothers() -> None:
    cluster = Cluster({"p0": "ab", "p1": "cd"}, slots=1)
    await cluster.enter("a").wait(1)
    running = await cluster.enter("c").wait(1)
    cluster.enter("b", age=99.0)
    waiting = cluster.enter("d")
    running.release()
    await settle()
    assert served(waiting) == [True]


async def test_all_who_wait_for_the_same_slots_cost_one_look() -> None:
    digests = [chr(0x4E00 + i) for i in range(1000)]
    cluster = Cluster({"p0": "xy" + "".join(digests)}, slots=1, max_queue=2000)
    running = await cluster.enter("x").wait(1)
    waiting = [cluster.enter(digest) for digest in digests]
    cluster.admission.wake()
    await settle()
    choices = 0
    place = cluster.admission._policy.place

    class Counting:
        def place(self, *arguments: object) -> object:
            nonlocal choices
            choices += 1
            return place(*arguments)  # type: ignore[arg-type]

    cluster.admission._policy = Counting()  # type: ignore[assignment]
    running.release()
    await settle()
    assert served(*waiting[:2]) == [True, False]
    assert choices == 2


async def test_refusing_all_reaches_all_though_one_has_just_left() -> None:
    cluster = Cluster({"p0": ""})
    tickets = [cluster.enter("a") for _ in range(3)]
    tasks = [asyncio.create_task(ticket.wait(1)) for ticket in tickets]
    await settle()
    tasks[0].cancel()
    tickets[0].outcome.cancel()
    cluster.admission.close(Unavailable("the server is shutting down"))
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [asyncio.CancelledError, Unavailable, Unavailable]


class Storm:
    """Random requests, loads that end in all ways, workers that come and go, adapters that are evicted."""

    def __init__(self, seed: int) -> None:
        self.draw = draw = random.Random(seed)
        self.slots = draw.randint(0, 2)
        self.cluster = Cluster(
            {f"p{i}": "" for i in range(draw.randint(1, 3))},
            self.slots,
            prefills=draw.randint(1, 8),
            max_queue=draw.randint(5, 40),
            decode_blocks=draw.choice([8, 1000]),
        )
        self.waiting: dict[str, list[Ticket]] = {}  # by digest, in the order of entering
        self.leases: list[Lease] = []
        self.refused: set[str] = set()  # digests
        self.ends = {"served": 0, "failed": 0, "left": 0, "turned away": 0}

    def step(self) -> None:
        draw, cluster = self.draw, self.cluster
        match draw.choice("eeeeeeppprrlllfxcbbk"):
            case "e" if cluster.up:
                try:
                    ticket = cluster.enter(draw.choice(["", *"aabcdef"]), draw.randint(1, 3), draw.choice([0, 0, 1]))
                    self.waiting.setdefault(ticket.demand.digest, []).append(ticket)
                except QueueFull:
                    self.ends["turned away"] += 1
            case "p" if self.leases:
                draw.choice(self.leases).prompt_ended()
            case "r" if self.leases:
                self.leases.pop(draw.randrange(len(self.leases))).release()
            case "l" if cluster.loading:
                cluster.load_ends(*draw.choice(cluster.loading))
            case "f" if cluster.loading:
                worker, digest = draw.choice(cluster.loading)
                self.refused.add(digest)
                cluster.load_ends(worker, digest, Unavailable("no room"))
            case "x" if cluster.held:  # evicted
                held = cluster.held[draw.choice(sorted(cluster.held))]
                held -= set(draw.sample(sorted(held), len(held) // 2))
            case "c" if any(self.waiting.values()):
                queue = draw.choice([queue for queue in self.waiting.values() if queue])
                queue.pop(draw.randrange(len(queue))).cancel()
                self.ends["left"] += 1
            case "b":
                cluster.beat()
            case "k":
                name = draw.choice(sorted(cluster.held))
                if name in cluster.up:
                    cluster.up.remove(name)
                    cluster.held[name].clear()
                    cluster.beat()
                    for worker, digest in cluster.loading:
                        if worker == name:
                            cluster.load_ends(worker, digest, lost=True)
                else:
                    cluster.up.add(name)
                    cluster.beat()

    def check(self) -> None:
        for digest, queue in self.waiting.items():
            done = [ticket for ticket in queue if ticket.outcome.done()]
            whole = [ticket.outcome for ticket in queue if not (ticket in done and ticket.outcome.exception())]
            assert [outcome.done() for outcome in whole] == sorted((each.done() for each in whole), reverse=True)
            for ticket in done:
                queue.remove(ticket)
                if ticket.outcome.exception() is not None:
                    assert digest in self.refused
                    self.ends["failed"] += 1
                    continue
                lease = ticket.outcome.result()
                self.leases.append(lease)
                self.ends["served"] += 1
        cluster = self.cluster
        assert cluster.admission.waiting == sum(map(len, self.waiting.values()))
        for worker in cluster.held:
            assert not self.slots or cluster.ledger.distinct_adapters(worker) <= self.slots

    async def run(self) -> None:
        for _ in range(300):
            self.step()
            if self.draw.random() < 0.7:
                await settle()
                self.check()
        self.cluster.up = set(self.cluster.held)
        self.cluster.beat()
        for _ in range(2000):  # no new ones: all that wait must be served, without heartbeats
            await settle()
            self.check()
            if self.leases:
                self.leases.pop(0).release()
            elif self.cluster.loading:
                self.cluster.load_ends(*self.cluster.loading[0])
            elif not self.cluster.admission.waiting:
                break
            else:
                raise AssertionError("requests wait for nothing")
        assert not any(self.waiting.values())
        assert self.cluster.untouched
        assert self.cluster.admission._queues == {}


@given(st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_storms(seed: int) -> None:
    """Each request is served once, fails with its own adapter's error, or leaves; in its adapter's order."""

    async def storm() -> None:
        await Storm(seed).run()

    with asyncio.Runner() as runner:
        runner.run(storm())
