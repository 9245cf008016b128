"""The queue: who is next, who is turned away, and that leaving it leaves nothing behind."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterable
from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from preft.core.cluster import Role
from preft.core.errors import (
    DeadlineExceeded,
    InvalidAdapter,
    InvalidRequest,
    PreftError,
    QueueFull,
    SourceNotFound,
    Unavailable,
)
from preft.router.admission import TRIES, TURN, Admission
from preft.router.fair_share import FairShare
from preft.router.lease import Lease
from preft.router.policy import AffinityPolicy, Demand, Placement
from preft.router.ticket import Ticket
from preft.router.view import ClusterView
from preft.router.worker_view import WorkerView
from support.invented_cluster import Member, a_message, a_worker, check_indexes, d, p, view_of
from support.readable_ref import ReadableRef

NEVER = 3600.0  # seconds of patience


def workers_of(decode: int = 1, blocks: int = 10) -> list[Member]:
    return [p("p0"), *(d(f"d{i}", blocks=blocks) for i in range(decode))]


class Queue:
    """An admission over invented workers. Nothing is ever loaded: requests name no adapter that could be."""

    def __init__(
        self,
        *members: Member,
        max_queue: int = 100,
        prefills: int = 100,
        grace: float = 0.1,
        patience: float = NEVER,
    ) -> None:
        self.view = view_of(*members, max_prefills=prefills)
        policy = AffinityPolicy(patience=patience, load_price=5)
        self.admission = Admission(policy, self.view, max_queue, grace, FairShare({}), lambda worker, adapter: None)
        self.admission.workers_changed()

    def become(self, *members: Member) -> None:
        """The registry's new list, of which all have told their state."""
        known = set(self.view.workers.values())
        self.view.register(member.worker for member in members)
        for member in members:
            if member.update is not None and self.view.workers[member.worker.id] not in known:
                self.view.workers[member.worker.id].told(member.update)
        self.admission.workers_changed()

    def enter(self, blocks: int = 10, digest: str = "a", *, started: bool = False, age: float = 0.0) -> Ticket:
        return self.ask(Demand(digest, kv_tokens=blocks * 16, max_tokens=blocks * 16), started=started, age=age)

    def prompt(self, blocks: int, digest: str = "") -> Ticket:
        return self.ask(Demand(digest, blocks * 16, blocks * 16, prompt_tokens=blocks * 16))

    def ask(self, demand: Demand, *, started: bool = False, age: float = 0.0) -> Ticket:
        came = asyncio.get_running_loop().time() - age
        demand = replace(demand, order=self.admission.shares.order(came, "", 0, 0))
        return self.admission.enter(demand, range(demand.choices), started=started)

    @property
    def waiting(self) -> int:
        return self.admission.waiting

    @property
    def idle(self) -> bool:
        return all(one.idle for one in self.view.workers.values())


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def served(*tickets: Ticket) -> list[bool]:
    return [ticket.outcome.done() for ticket in tickets]


async def test_room_is_given_at_once() -> None:
    queue = Queue(*workers_of())
    ticket = queue.enter()
    lease = await ticket.wait(1)
    assert lease.decode is not None
    assert queue.waiting == 0
    lease.release()
    assert queue.idle


async def test_an_adapters_requests_are_served_in_their_order() -> None:
    queue = Queue(*workers_of())
    first, *rest = [queue.enter() for _ in range(4)]
    assert served(*rest) == [False] * 3
    for i in range(3):
        (await (first if i == 0 else rest[i - 1]).wait(1)).release()
        await settle()
        assert served(*rest) == [True] * (i + 1) + [False] * (2 - i)


async def test_the_oldest_of_all_adapters_is_next() -> None:
    queue = Queue(*workers_of())
    running = queue.enter(digest="x")
    waiting = [queue.enter(digest=digest) for digest in "bacab"]
    (await running.wait(1)).release()
    await settle()
    for i, ticket in enumerate(waiting):
        assert served(*waiting) == [True] * (i + 1) + [False] * (4 - i)
        (await ticket.wait(1)).release()
        await settle()
    assert queue.idle


async def test_a_big_request_doesnt_hold_up_others() -> None:
    queue = Queue(*workers_of())
    running = queue.enter(blocks=6)
    big, small = queue.enter(blocks=8, digest="big"), queue.enter(blocks=4, digest="small")
    assert served(big, small) == [False, True]
    (await running.wait(1)).release()
    (await small.wait(1)).release()
    await settle()
    assert served(big) == [True]


async def test_small_requests_in_the_queue_pass_a_big_one() -> None:
    queue = Queue(*workers_of())
    running = [queue.enter(blocks=5) for _ in range(2)]
    big, small = queue.enter(blocks=8, digest="big"), queue.enter(blocks=4, digest="small")
    assert served(big, small) == [False, False]
    (await running[0].wait(1)).release()
    await settle()
    assert served(big, small) == [False, True]


async def test_a_big_request_isnt_starved_by_small_ones() -> None:
    queue = Queue(*workers_of(decode=2), patience=0.05)
    running = [await queue.enter(blocks=5, digest=f"r{i}").wait(1) for i in range(4)]
    big = queue.enter(blocks=10, digest="big")
    await asyncio.sleep(0.1)
    [kept] = [one for one in queue.view.workers.values() if one.memory_for]
    first, second = (lease for lease in running if lease.decode is kept)
    first.release()
    await settle()
    assert served(queue.enter(blocks=5, digest="s")) == [False]  # the room is kept
    second.release()
    await settle()
    assert served(big) == [True]


async def test_memory_is_kept_for_the_oldest_and_not_on_a_worker_that_is_lost() -> None:
    queue = Queue(*workers_of(decode=2), patience=0.0)
    leases = [await queue.enter(blocks=5, digest=f"r{i}").wait(1) for i in range(4)]
    queue.enter(blocks=10, digest="big")
    older = queue.enter(blocks=8, digest="older", age=1.0)

    def kept() -> list[WorkerView]:
        return [one for one in queue.view.workers.values() if one.memory_for]

    [lost] = kept()
    assert lost.memory_for == older.demand.order
    lost.lost(0.0)
    queue.admission.workers_changed()
    await settle()
    [other] = kept()
    assert other is not lost
    lost.told(a_message())
    for lease in leases:
        lease.release()
    await settle()
    assert queue.waiting == 0
    assert kept() == []


def staging(prompts: int = 2, decode: int | None = None) -> list[Member]:
    """Staging memory for so many prompts of one block, on each side."""
    return [p("p0", staging=prompts), d("d0", blocks=1000, staging=decode or prompts)]


async def test_staging_memory_holds_the_queue() -> None:
    """What has no room waits here, not on a worker; a smaller prompt may pass."""
    queue = Queue(*staging(3))
    running = [queue.prompt(1) for _ in range(2)]
    big, small = queue.prompt(2, "big"), queue.prompt(1, "small")
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
async def test_a_long_prompt_isnt_starved_of_staging_memory(side: str) -> None:
    queue = Queue(*staging(), patience=0.05)
    running = [await queue.prompt(1).wait(1) for _ in range(2)]
    if side == "decode":
        for lease in running:
            lease.prefill_ended()
    big = queue.prompt(2, "")
    await asyncio.sleep(0.1)
    running[0].release()
    await settle()
    assert served(queue.prompt(1, "small")) == [False]  # the room is kept
    running[1].release()
    await settle()
    assert served(big) == [True]


async def test_a_long_prompt_that_waits_for_its_adapters_worker_isnt_starved_of_its_staging_memory() -> None:
    """Another worker has room, but the adapter is here, and the base model's prompts need no slot."""
    workers = p("p0", staging=2, adapters="a"), p("p1", staging=2), d("d0", blocks=1000, staging=99)
    queue = Queue(*workers, patience=0.0)
    running = [await queue.prompt(1).wait(1) for _ in range(4)]
    queue.view.workers["p1"].queue("x", 1, 3)  # so that p0 is the less busy one
    [first, second] = [lease for lease in running if lease.prefill.id == "p0"]
    next(lease for lease in running if lease.prefill.id == "p1").prefill_ended()
    next(lease for lease in reversed(running) if lease.prefill.id == "p1").prefill_ended()
    big = queue.prompt(2, "a")
    assert served(big) == [False]
    await asyncio.sleep(0.01)
    first.prefill_ended()
    await settle()
    small = queue.prompt(1)
    assert not served(small)[0] or (await small.wait(1)).prefill.id == "p1"
    second.prefill_ended()
    await settle()
    assert (await big.wait(1)).prefill.id == "p0"


@pytest.mark.parametrize(("sizes", "setting"), [((2, 9), "prefill"), ((9, 2), "decode")])
async def test_a_prompt_that_never_fits_is_refused_by_the_settings_name(sizes: tuple[int, int], setting: str) -> None:
    queue = Queue(*staging(*sizes))
    queue.prompt(2)
    with pytest.raises(InvalidRequest, match=rf"a prompt of 48 tokens doesn't fit .* raise {setting}\.staging_bytes$"):
        queue.prompt(3)
    assert served(queue.ask(Demand("", 48, 48, prompt_tokens=48, decodes=False))) == [True]  # sends nothing


async def test_leaving_gives_up_the_room_that_was_kept() -> None:
    queue = Queue(*workers_of(), patience=0.0)
    running = queue.enter(blocks=5)
    big = queue.enter(blocks=10, digest="big")
    await asyncio.sleep(0.01)
    queue.admission.wake()
    await settle()
    small = queue.enter(blocks=5, digest="small")
    assert served(small) == [False]
    big.cancel()
    await settle()
    assert served(small) == [True]
    assert served(queue.enter(blocks=6, digest="third")) == [False]
    (await running.wait(1)).release()


async def test_the_last_to_leave_gives_up_the_room_too() -> None:
    queue = Queue(*workers_of(), patience=0.0)
    running = queue.enter(blocks=5)
    big = queue.enter(blocks=10, digest="big")
    await asyncio.sleep(0.01)
    queue.admission.wake()
    await settle()
    big.cancel()
    assert served(running, queue.enter(blocks=5, digest="small")) == [True, True]


async def test_a_full_queue() -> None:
    queue = Queue(*workers_of(), max_queue=2)
    tickets = [queue.enter() for _ in range(3)]
    with pytest.raises(QueueFull) as caught:
        queue.enter(digest="b")
    assert 1 <= caught.value.retry_after <= 30
    assert queue.waiting == 2
    again = queue.enter(started=True, age=1.0)  # it has begun: never turned away, and older than the others
    (await tickets[0].wait(1)).release()
    await settle()
    assert served(tickets[1], again) == [False, True]


async def test_leaving_the_queue_makes_room() -> None:
    queue = Queue(*workers_of(), max_queue=1)
    queue.enter()
    waiting = queue.enter()
    waiting.cancel()
    waiting.cancel()
    assert queue.waiting == 0
    assert served(queue.enter()) == [False]


async def test_a_deadline_in_the_queue() -> None:
    queue = Queue(*workers_of())
    queue.enter()
    with pytest.raises(DeadlineExceeded):
        await queue.enter().wait(0.01)
    assert queue.waiting == 0


async def test_cancelled_in_the_instant_of_being_served() -> None:
    queue = Queue(*workers_of())
    running = await queue.enter().wait(1)
    ticket = queue.enter()
    waiting = asyncio.create_task(ticket.wait(1))
    await settle()
    running.release()
    waiting.cancel()  # the queue is looked through before the task knows
    await asyncio.gather(waiting, return_exceptions=True)
    await settle()
    assert queue.idle

    running = await queue.enter().wait(1)
    ticket = queue.enter()
    waiting = asyncio.create_task(ticket.wait(1))
    await settle()
    running.release()
    asyncio.get_running_loop().call_soon(waiting.cancel)  # served, but the task doesn't know yet
    await asyncio.gather(waiting, return_exceptions=True)
    await settle()
    assert queue.idle


async def test_a_lease_nobody_took_is_given_back() -> None:
    queue = Queue(*workers_of())
    queue.enter().cancel()
    assert queue.idle


async def test_what_fits_nowhere_is_refused_at_once() -> None:
    queue = Queue(*workers_of(decode=2))
    with pytest.raises(InvalidRequest, match="176 tokens, no decode worker holds more than 160") as caught:
        queue.enter(blocks=11)
    assert caught.value.param == "max_tokens"
    with pytest.raises(InvalidRequest, match="3 choices") as caught:
        queue.ask(Demand("a", 64, 64, choices=3))
    assert caught.value.param == "n"
    assert queue.idle
    assert served(queue.ask(Demand("a", 9999, 9999, decodes=False))) == [True]


async def test_requests_wait_for_workers_that_were_there_a_moment_ago() -> None:
    queue = Queue(grace=0.1)
    with pytest.raises(Unavailable):
        queue.enter()  # there were none yet
    queue.become(*workers_of())
    running = queue.enter()
    waiting = queue.enter()
    queue.become()
    begun = queue.enter(started=True, age=1.0)
    late = queue.enter()
    assert served(waiting, begun, late) == [False] * 3
    await asyncio.sleep(0.05)
    (await running.wait(1)).release()
    queue.become(*workers_of())
    await settle()
    assert served(waiting, begun) == [False, True]
    (await begun.wait(1)).release()
    await settle()
    assert served(waiting, late) == [True, False]
    (await waiting.wait(1)).release()
    await settle()
    assert served(late) == [True]


async def test_workers_that_dont_come_back_end_the_waiting() -> None:
    queue = Queue(*workers_of(), grace=0.5)
    queue.enter()
    waiting = queue.enter()
    queue.become()
    late = queue.enter()
    await asyncio.sleep(0.6)
    with pytest.raises(Unavailable):
        queue.enter()
    queue.become()
    for ticket in (waiting, late):
        with pytest.raises(Unavailable):
            await ticket.wait(1)
    assert queue.waiting == 0


async def test_what_waits_for_workers_is_checked_against_those_that_come() -> None:
    queue = Queue(*workers_of(blocks=20), grace=1.0)
    queue.become()
    late = [queue.enter(blocks=11), queue.enter(blocks=10)]
    gone = queue.enter(blocks=12)
    gone.cancel()
    queue.become(*workers_of(blocks=10))
    await settle()
    with pytest.raises(InvalidRequest, match="no decode worker holds more than 160"):
        await late[0].wait(1)
    (await late[1].wait(1)).release()
    assert queue.idle
    assert queue.waiting == 0


async def test_new_workers_are_used_at_once() -> None:
    queue = Queue(*workers_of(decode=1))
    tickets = [queue.enter() for _ in range(3)]
    queue.become(*workers_of(decode=3))
    await settle()
    assert served(*tickets) == [True] * 3


async def test_prefill_limits_hold_the_queue() -> None:
    queue = Queue(*workers_of(blocks=1000), prefills=2)
    tickets = [queue.enter(blocks=1, digest=f"a{i}") for i in range(4)]
    assert served(*tickets) == [True, True, False, False]
    (await tickets[0].wait(1)).prefill_ended()
    await settle()
    assert served(*tickets) == [True, True, True, False]


async def test_closing_turns_everything_away() -> None:
    queue = Queue(*workers_of())
    queue.enter()
    waiting = queue.enter()
    queue.admission.close(Unavailable("the server is shutting down"))
    queue.become(*workers_of())  # what is still heard of workers opens nothing again
    with pytest.raises(Unavailable, match="shutting down"):
        await waiting.wait(1)
    for started in (False, True):
        with pytest.raises(Unavailable, match="shutting down"):
            queue.enter(started=started)


async def test_a_long_queue_is_looked_through_quickly() -> None:
    """A thousand adapters wait for one full cluster: each release costs one look, not a thousand choices."""
    queue = Queue(*workers_of(decode=4), max_queue=2000)
    running = [queue.enter(digest=f"r{i}") for i in range(4)]
    waiting = [queue.enter(digest=f"w{i}") for i in range(1000)]
    choices = counted_choices(queue.admission)
    (await running[0].wait(1)).release()
    await settle()
    assert served(waiting[0]) == [True]
    assert len(choices) == 2


async def test_all_that_fit_go_though_many_came_in_one_instant() -> None:
    """A look at the queue ends after some tries; the next one goes on."""
    queue = Queue(*workers_of(blocks=1000))
    running = await queue.enter(blocks=1000, digest="x").wait(1)
    first = queue.enter(blocks=1, digest="first")
    running.release()
    tickets = [queue.enter(blocks=1, digest=f"w{i}") for i in range(5 * TRIES)]
    for _ in range(10):
        await settle()
    assert all(served(first, *tickets))


async def test_a_lease_on_workers_that_were_replaced_ends_while_others_wait() -> None:
    queue = Queue(*workers_of())
    old = await queue.enter().wait(1)
    queue.become(p("p0", pid=2), d("d0", blocks=10, pid=2))
    new = await queue.enter().wait(1)
    waiting = queue.enter()
    old.release()
    await settle()
    assert served(waiting) == [False]
    new.release()
    await settle()
    assert served(waiting) == [True]


# Adapters that come in while their requests wait, and slots


class Cluster:
    """An admission over prefill workers whose loads end when the test says so. Decode has room without end."""

    def __init__(
        self,
        held: dict[str, Iterable[str]],
        slots: int = 0,
        prefills: int = 100,
        max_queue: int = 100,
        decode_blocks: int = 10**6,
        patience: float = 0.5,
        staging: int = 0,
        decoders: int = 1,
    ) -> None:
        """`held`: worker id -> the adapters in its memory, by default a letter each."""
        self.held = {worker: set(digests) for worker, digests in held.items()}
        self.slots, self.staging = slots, staging
        self.decoders = [a_worker(f"d{i}", Role.DECODE, blocks=decode_blocks, staging=staging) for i in range(decoders)]
        self.up = set(self.held)
        self.asked: list[tuple[str, str]] = []  # (worker, digest) in the order of the calls
        self.calls: dict[tuple[str, str], WorkerView] = {}  # under way
        self.view = ClusterView(prefills, 0.25)
        policy = AffinityPolicy(patience=patience, load_price=5)
        self.admission = Admission(policy, self.view, max_queue, 60.0, FairShare({}), self.prefetch)
        self.beat()

    def prefetch(self, worker: WorkerView, adapter: ReadableRef) -> None:
        assert worker.is_ready
        assert adapter.digest not in worker.loads
        worker.load_begins(adapter.digest)
        self.asked.append((worker.id, adapter.digest))
        self.calls[self.asked[-1]] = worker

    @property
    def loading(self) -> list[tuple[str, str]]:
        return list(self.calls)

    def load_ends(self, worker: str, digest: str, error: PreftError | None = None, lost: bool = False) -> None:
        done = error is None and not lost
        if done:
            self.held[worker].add(digest)
        one = self.calls.pop((worker, digest))
        one.load_ended(digest, asyncio.get_running_loop().time(), done=done)
        self.admission.load_ended(one, digest, error)

    def beat(self) -> None:
        """The registry is read, and all workers that are up tell what they hold."""
        members = [a_worker(name, Role.PREFILL, slots=self.slots, staging=self.staging) for name in sorted(self.up)]
        self.view.register([*members, *self.decoders])
        for one in self.view.workers.values():
            one.told(a_message(self.held.get(one.id, ()), loading=one.loads - self.held.get(one.id, set())))
            self.admission.wake(one)
        self.admission.workers_changed()

    def enter(
        self,
        digest: str,
        blocks: int = 1,
        age: float = 0.0,
        avoid: frozenset[str] = frozenset(),
        started: bool = False,
    ) -> Ticket:
        adapter = ReadableRef(digest, digest, "/") if digest else None
        order = self.admission.shares.order(asyncio.get_running_loop().time() - age, "", 0, 0)
        prompt = blocks * 16 if self.staging else 0
        demand = Demand(digest, blocks * 16, blocks * 16, prompt, adapter=adapter, order=order, avoid=avoid)
        return self.admission.enter(demand, [0], started=started)

    @property
    def untouched(self) -> bool:
        """No room is reserved, no slot is taken."""
        return all(one.idle and not one.slots_used for one in self.view.workers.values())


def counted_choices(admission: Admission) -> list[Placement]:
    """The policy's answers from now on."""
    answers, place = list[Placement](), admission._policy.place

    class Counting(AffinityPolicy):
        def place(self, demand: Demand, view: ClusterView, now: float) -> Placement:
            answers.append(place(demand, view, now))
            return answers[-1]

    admission._policy = Counting()
    return answers


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
    assert cluster.asked.count((where["a"], "a")) == 1
    other = {"p0": "p1", "p1": "p0"}[where["a"]]
    assert cluster.asked[-1] == (other, "a")
    cluster.load_ends(other, "a")
    cluster.load_ends(where["c"], "c")
    await settle()
    cluster.load_ends(*cluster.asked[-1])  # a copy for "c", as its holder is busy
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
    running = [await cluster.enter("a").wait(1) for _ in range(3)]
    waiting = [cluster.enter("a") for _ in range(2)]
    assert cluster.asked == [("p1", "a")]
    cluster.load_ends("p1", "a", SourceNotFound("nothing there any more"))
    await settle()
    assert served(*waiting) == [True] * 2
    assert {(await ticket.wait(1)).prefill.id for ticket in waiting} == {"p0"}
    running += [await cluster.enter("a").wait(1) for _ in range(3)]
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
    running = [await cluster.enter("a").wait(1) for _ in range(3)]
    waiting = cluster.enter("a")
    assert cluster.asked == [("p1", "a")]
    assert served(waiting) == [False]
    running[0].release()
    await settle()
    assert served(waiting) == [True]
    assert cluster.loading == [("p1", "a")]


async def test_an_adapter_that_is_evicted_at_once_or_never_listed_is_served() -> None:
    """The load's end counts as presence until the worker tells of the adapter: no endless asking."""
    cluster = Cluster({"p0": ""})
    for _ in range(3):
        ticket = cluster.enter("a")
        cluster.load_ends("p0", "a")
        cluster.held["p0"].clear()
        await settle()
        (await ticket.wait(1)).release()
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


async def test_requests_share_a_slot_with_another_routers_requests() -> None:
    cluster = Cluster({"p0": "abcx"}, slots=2)
    one = cluster.view.workers["p0"]
    one.told(a_message("abcx", others={"x": 1}))
    await cluster.enter("a").wait(1)
    older, *others = [cluster.enter(digest) for digest in "bcc"]
    assert served(older, *others) == [False] * 3
    one.told(a_message("cx", others={"x": 0, "c": 1}, whole=False))
    cluster.admission.wake(one)
    await settle()
    assert served(older, *others) == [False, True, True]


async def test_busy_adapters_dont_starve_one_that_waits_for_their_slot() -> None:
    """`a` always has a prompt in the only slot of p0. When `b` has waited long, `a` gets no more, and only there."""
    cluster = Cluster({"p0": "ab", "p1": "c"}, slots=1, patience=0.1)
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


@pytest.mark.parametrize("end", ["cancelled", "evicted", "lost", "no workers"])
async def test_slots_that_were_kept_are_free_again(end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However the request ends for which they were kept, or if it waits for something else now."""
    cluster = Cluster({"p0": "ab"}, slots=1)
    running = await cluster.enter("a").wait(1)
    old = cluster.enter("b", age=99.0)
    cluster.admission.wake()
    await settle()
    one = cluster.view.workers["p0"]
    assert one.slot_for == old.demand.order
    if end == "cancelled":
        old.cancel()
        assert one.slot_for is None  # at once
    elif end == "evicted":
        cluster.held["p0"].remove("b")
        cluster.beat()
    elif end == "lost":
        one.lost(0.0)
        cluster.admission.workers_changed()
        await settle()
        cluster.held["p0"].remove("b")
        cluster.beat()
    else:
        monkeypatch.setattr(cluster.admission, "_restart_grace", -1.0)
        cluster.view.register([])
        cluster.admission.workers_changed()
        with pytest.raises(Unavailable):
            await old.wait(1)
        cluster.beat()
    await settle()
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
    choices = counted_choices(cluster.admission)
    running.release()
    await settle()
    assert served(*waiting[:2]) == [True, False]
    assert len(choices) == 2


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
                self.harvest()
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
                    if draw.random() < 0.5:  # its stream breaks first
                        cluster.view.workers[name].lost(0.0)
                        cluster.admission.workers_changed()
                    cluster.beat()
                    for worker, digest in cluster.loading:
                        if worker == name:
                            cluster.load_ends(worker, digest, lost=True)
                else:
                    cluster.up.add(name)
                    cluster.beat()

    def harvest(self) -> None:
        """Takes the tickets that are served or failed: of one adapter always the oldest ones."""
        for digest, queue in self.waiting.items():
            done = [ticket for ticket in queue if ticket.outcome.done()]
            whole = [ticket for ticket in queue if not (ticket in done and ticket.outcome.exception())]
            whole.sort(key=lambda ticket: ticket.demand.order)
            order = [ticket.outcome.done() for ticket in whole]
            assert order == sorted(order, reverse=True)
            for ticket in done:
                queue.remove(ticket)
                if ticket.outcome.exception() is not None:
                    assert digest in self.refused
                    self.ends["failed"] += 1
                    continue
                lease = ticket.outcome.result()
                self.leases.append(lease)
                self.ends["served"] += 1

    def check(self) -> None:
        self.harvest()
        cluster = self.cluster
        assert cluster.admission.waiting == sum(map(len, self.waiting.values()))
        for one in cluster.view.workers.values():
            assert not self.slots or one.slots_used <= self.slots
            assert one.queued == sum(len(line.tickets) for line in cluster.admission._lines if line.at is one)
        check_indexes(cluster.view)
        self.check_kept()

    def check_kept(self) -> None:
        """Slots and memory are kept for requests that wait, for none other."""
        orders = {ticket.demand.order for queue in self.waiting.values() for ticket in queue}
        for one in self.cluster.view.workers.values():
            assert one.slot_for in {None, *orders}
            assert one.memory_for in {None, *orders}

    async def run(self) -> None:
        for _ in range(300):
            self.step()
            if self.draw.random() < 0.7:
                await settle()
                self.check()
        self.cluster.up = set(self.cluster.held)
        self.cluster.beat()
        for _ in range(2000):  # no new ones: all that wait must be served, without news of the workers
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
        assert not self.cluster.admission._lines


@given(st.integers(0, 10**6))
@example(144212)  # a line that an older request without room held back waited for a worker with room
@example(1204)  # a worker's other lines went elsewhere, and its own line wasn't looked at
@settings(max_examples=60, deadline=None)
def test_storms(seed: int) -> None:
    """Each request is served once, fails with its own adapter's error, or leaves; in its adapter's order."""

    async def storm() -> None:
        await Storm(seed).run()

    with asyncio.Runner() as runner:
        runner.run(storm())


# Turns and age


async def test_a_line_goes_together_in_one_turn() -> None:
    """Up to TURN requests of one adapter share the slot, though older ones of another adapter wait for one."""
    cluster = Cluster({"p0": "xab"}, slots=1, max_queue=200, patience=NEVER)
    running = await cluster.enter("x").wait(1)
    first, other = cluster.enter("a"), cluster.enter("b")
    others = [cluster.enter("a") for _ in range(2 * TURN)]
    running.release()
    await settle()
    tickets = [first, *others]
    assert served(*tickets) == [True] * len(tickets)
    assert served(other) == [False]
    leases = [await ticket.wait(1) for ticket in tickets]
    for lease in leases[:-1]:
        lease.prompt_ended()
        await settle()
        assert served(other) == [False]
    leases[-1].prompt_ended()
    await settle()
    assert served(other) == [True]


async def test_a_turn_ends_where_another_request_has_waited_long() -> None:
    cluster = Cluster({"p0": "xab"}, slots=1, max_queue=200, patience=0.05)
    running = await cluster.enter("x").wait(1)
    first, other = cluster.enter("a"), cluster.enter("b")
    others = [cluster.enter("a") for _ in range(2 * TURN)]
    await asyncio.sleep(0.1)
    running.release()
    await settle()
    assert served(first, other) == [True, False]
    assert sum(served(*others)) == TURN - 1
    for ticket in [first, *others[: TURN - 1]]:
        (await ticket.wait(1)).release()
        await settle()
    assert served(other) == [True]


@pytest.mark.parametrize("cold", [False, True])
async def test_adapters_that_are_not_there_hold_up_nobody(cold: bool) -> None:
    """However many lines wait for their adapters' loads, one whose adapter is there gets the free slot."""
    digests = [chr(0x4E00 + i) for i in range(3 * TRIES)]
    cluster = Cluster({"p0": "xy"}, slots=1)
    running = await cluster.enter("x").wait(1)
    waiting = [cluster.enter(digest) for digest in (digests if cold else [])]
    ready = cluster.enter("y")
    running.release()
    await settle()
    assert served(ready) == [True]
    assert not any(served(*waiting))
    assert len(cluster.loading) <= 2  # not all at once


class Crowd(Storm):
    """A storm over several decode workers, with little staging memory, and no patience in most cases."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        draw = self.draw
        self.cluster = Cluster(
            {f"p{i}": draw.sample("abcdef", draw.randint(0, 6)) for i in range(draw.randint(1, 4))},
            self.slots,
            prefills=draw.randint(1, 8),
            max_queue=draw.randint(5, 60),
            decode_blocks=draw.choice([4, 8, 1000]),
            patience=draw.choice([0.0, 0.0, 0.5]),
            staging=draw.choice([0, 3, 6]),
            decoders=draw.randint(1, 3),
        )


@given(st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_crowds(seed: int) -> None:
    """As storms, with several decode workers and little staging memory."""

    async def crowd() -> None:
        await Crowd(seed).run()

    with asyncio.Runner() as runner:
        runner.run(crowd())


@given(st.integers(0, 10**6))
@settings(max_examples=100, deadline=None)
def test_a_request_waits_no_longer_than_what_ran_before_it(seed: int) -> None:
    """Without patience: in a full cluster with a stream of younger requests, of any size and for any adapter."""

    async def flood() -> None:
        storm = Crowd(seed)
        draw, cluster = storm.draw, storm.cluster
        cluster.admission._policy = AffinityPolicy(patience=0.0)
        leases, young, queued = list[Lease](), list[Ticket](), 3

        def come() -> None:
            while cluster.admission.waiting < queued:
                young.append(cluster.enter(draw.choice(["", *"abcdef"]), draw.randint(1, 2)))

        def go_on() -> None:
            for ticket in [ticket for ticket in young if ticket.outcome.done()]:
                young.remove(ticket)
                leases.append(ticket.outcome.result())
            if leases:
                leases.pop(0).release()
            for load in cluster.loading:
                cluster.load_ends(*load)

        for _ in range(20):
            come()
            go_on()
            await settle()
        oldest = cluster.enter(draw.choice(["", *"abcdef"]), 3, age=99.0, started=True)
        running = sum(one.prefills + one.sequences for one in cluster.view.workers.values())
        for _ in range(running + 10):
            come()
            go_on()
            await settle()
            if oldest.outcome.done():
                break
        assert oldest.outcome.done()

    with asyncio.Runner() as runner:
        runner.run(flood())


async def test_the_waits_of_all_leases_add_up() -> None:
    queue = Queue(*workers_of())
    first = queue.enter()
    second = queue.enter()
    await asyncio.sleep(0.05)
    lease = await first.wait(1)
    assert queue.admission.leases == 1
    assert queue.admission.waited < 0.04
    lease.release()
    (await second.wait(1)).release()
    assert queue.admission.leases == 2
    assert 0.05 <= queue.admission.waited < 1
