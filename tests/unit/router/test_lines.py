"""The order of waiting requests: by age within a line, and of lines by their oldest request."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from preft.core.cluster import Role
from preft.router.lines import Lines
from preft.router.policy import Demand
from preft.router.worker_view import WorkerView
from support.invented_cluster import a_worker


@dataclass(frozen=True)
class Waiting:
    """As much of a ticket as a line looks at."""

    demand: Demand


def a_ticket(digest: str, age: int, number: int = 0) -> Waiting:
    return Waiting(Demand(digest, 1, 1, order=(float(age), number, float(age))))


def add(lines: Lines, *tickets: Waiting) -> None:
    for ticket in tickets:
        lines.add(ticket)  # type: ignore[arg-type]


def test_a_line_is_in_order_of_age_not_of_entry() -> None:
    lines, tickets = Lines(), [a_ticket("a", age) for age in (3, 1, 2)]
    add(lines, *tickets)
    line = lines.get("a")
    assert line is not None
    assert [ticket.demand.order[0] for ticket in line.tickets] == [1, 2, 3]
    assert line.head is tickets[1]
    assert lines.waiting == 3


def test_the_line_with_the_oldest_head_is_first() -> None:
    lines = Lines()
    add(lines, a_ticket("a", 2), a_ticket("b", 1), a_ticket("c", 3))
    assert [lines.oldest(None, skip).digest for skip in range(3)] == ["b", "a", "c"]  # type: ignore[union-attr]
    assert lines.oldest(None, 3) is None
    add(lines, a_ticket("c", 0))
    assert lines.oldest(None, 0) is lines.get("c")


def test_waiting_requests_count_as_load_of_their_worker() -> None:
    lines, p0, p1 = Lines(), *(WorkerView(a_worker(name, Role.PREFILL), None) for name in ("p0", "p1"))
    first, second, third = (a_ticket("a", age) for age in (1, 2, 3))
    add(lines, first, second)
    line = lines.get("a")
    assert line is not None
    lines.move(line, p0)
    assert (p0.load, p1.load) == (2, 0)
    add(lines, third)
    assert lines.remove(first)  # type: ignore[arg-type]
    assert not lines.remove(first)  # type: ignore[arg-type]
    assert (p0.load, p1.load) == (2, 0)
    lines.move(line, p1)
    assert (p0.load, p1.load) == (0, 2)
    assert lines.first_at(p1, 9) == lines.elsewhere(p0, 9) == [line]
    assert lines.first_at(p0, 9) == lines.elsewhere(p1, 9) == []
    assert lines.take("a") == [second, third]
    assert lines.take("a") == []
    assert (p1.load, lines.waiting, bool(lines)) == (0, 0, False)


@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from("abcd"), st.integers(0, 9)), max_size=60))
@settings(deadline=None)
def test_the_lists_agree_with_the_lines(steps: list[tuple[int, str, int]]) -> None:
    """Whatever comes, leaves and moves, each line is listed once: where it waits, by the age of its head."""
    lines, tickets = Lines(), list[Waiting]()
    workers = [None, *(WorkerView(a_worker(f"p{i}", Role.PREFILL), None) for i in range(2))]
    for number, (what, digest, which) in enumerate(steps):
        line = lines.get(digest)
        if what < 2:
            tickets.append(a_ticket(digest, which, number))
            add(lines, tickets[-1])
        elif what == 2 and line is not None:
            lines.move(line, workers[which % 3])
        elif what == 3 and tickets:
            assert lines.remove(tickets.pop(which % len(tickets)))  # type: ignore[arg-type]
        for worker in workers:
            here = sorted((line for line in lines if line.at is worker), key=lambda line: line.head.demand.order)
            listed = [lines.oldest(worker, skip) for skip in range(len(here) + 1)]
            assert listed == [*here, None]
            if worker is not None:
                assert worker.queued == sum(len(line.tickets) for line in here)
                assert lines.number_at(worker) == len(here)
        assert lines.waiting == len(tickets)
        assert bool(lines) is bool(tickets)
