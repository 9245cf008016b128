"""The queue: who is next, who is turned away, and that leaving it leaves nothing behind."""

from __future__ import annotations

import asyncio

import pytest

from preft.core.cluster import ClusterSnapshot, Role, Worker, WorkerLoad, WorkerState
from preft.core.errors import DeadlineExceeded, InvalidRequest, QueueFull, Unavailable
from preft.router import admission as admission_module
from preft.router.admission import Admission, Ticket
from preft.router.ledger import Ledger
from preft.router.policy import AffinityPolicy, Demand, Roster


def a_worker(worker_id: str, role: Role, blocks: int = 10) -> Worker:
    load = WorkerLoad(kv_blocks_total=blocks, kv_blocks_free=blocks)
    return Worker(worker_id, role, WorkerState.READY, "h:1", "f", 1, load=load)


def roster_of(decode: int = 1, blocks: int = 10) -> Roster:
    workers = [a_worker("p0", Role.PREFILL), *(a_worker(f"d{i}", Role.DECODE, blocks) for i in range(decode))]
    return Roster.of(ClusterSnapshot({worker.id: worker for worker in workers}, 0.0))


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
    admission.close()
    with pytest.raises(Unavailable, match="shutting down"):
        await waiting.wait(1)
    with pytest.raises(Unavailable):
        enter(admission)


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
