"""The waiting requests: one line per adapter, filed where the line waits, in order of age.

This module keeps order alone. `admission` decides who goes, and `policy` where.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING

from sortedcontainers import SortedList

from preft.router.worker_view import Order, WorkerView

if TYPE_CHECKING:
    from preft.router.ticket import Ticket


class Line:
    """The requests of one adapter, oldest first; never empty. `at` is the worker they wait for; None: any."""

    __slots__ = ("at", "digest", "tickets")

    def __init__(self, digest: str) -> None:
        self.digest = digest
        self.tickets: list[Ticket] = []
        self.at: WorkerView | None = None

    @property
    def work(self) -> int:
        return sum(ticket.demand.work for ticket in self.tickets)

    @property
    def head(self) -> Ticket:
        return self.tickets[0]


class Lines:
    """All lines. A line's key is its head's order, so that a list of keys is in order of age."""

    def __init__(self) -> None:
        self.waiting = 0
        self._lines: dict[str, Line] = {}
        self._anywhere: SortedList[tuple[Order, str]] = SortedList()
        self._at: dict[str, SortedList[tuple[Order, str]]] = {}  # by worker id, never empty
        self._assigned: SortedList[tuple[Order, str]] = SortedList()  # all that wait for one worker

    def __bool__(self) -> bool:
        return bool(self._lines)

    def __contains__(self, digest: str) -> bool:
        return digest in self._lines

    def get(self, digest: str) -> Line | None:
        return self._lines.get(digest)

    def __iter__(self) -> Iterator[Line]:
        return iter(list(self._lines.values()))

    def add(self, ticket: Ticket) -> Line:
        """Puts the ticket into its adapter's line, by age."""
        digest = ticket.demand.digest
        line = self._lines.get(digest)
        if line is None:
            line = self._lines[digest] = Line(digest)
        else:
            self._unfile(line)
        insort(line.tickets, ticket, key=lambda one: one.demand.order)
        self.waiting += 1
        if line.at is not None:
            line.at.queue(digest, 1, ticket.demand.work)
        self._file(line)
        return line

    def remove(self, ticket: Ticket) -> bool:
        """Takes the ticket out of its line. Returns False if it isn't there."""
        line = self._lines.get(ticket.demand.digest)
        if line is None or ticket not in line.tickets:
            return False
        self._unfile(line)
        line.tickets.remove(ticket)
        self.waiting -= 1
        if line.at is not None:
            line.at.queue(line.digest, -1, -ticket.demand.work)
        if line.tickets:
            self._file(line)
        else:
            del self._lines[line.digest]
        return True

    def move(self, line: Line, at: WorkerView | None) -> None:
        """Files the line at another worker."""
        if line.at is at:
            return
        self._unfile(line)
        for worker, sign in ((line.at, -1), (at, 1)):
            if worker is not None:
                worker.queue(line.digest, sign * len(line.tickets), sign * line.work)
        line.at = at
        self._file(line)

    def take(self, digest: str) -> list[Ticket]:
        """Removes a whole line and returns its tickets."""
        line = self._lines.pop(digest, None)
        if line is None:
            return []
        self._unfile(line)
        self.waiting -= len(line.tickets)
        if line.at is not None:
            line.at.queue(digest, -len(line.tickets), -line.work)
        return line.tickets

    def oldest(self, worker: WorkerView | None, skip: int) -> Line | None:
        """The line that is number `skip` (from 0) by age of those that wait for `worker`, or for any (None)."""
        keys = self._anywhere if worker is None else self._at.get(worker.id, ())
        return self._lines[keys[skip][1]] if skip < len(keys) else None

    def first_at(self, worker: WorkerView, number: int) -> list[Line]:
        """The oldest lines that wait for `worker`, at most `number`."""
        return [self._lines[digest] for _, digest in islice(self._at.get(worker.id, ()), number)]

    def elsewhere(self, worker: WorkerView, number: int) -> list[Line]:
        """The oldest lines that wait for other workers: of the `number` oldest that wait for one."""
        lines = [self._lines[digest] for _, digest in islice(self._assigned, number)]
        return [line for line in lines if line.at is not worker]

    def number_at(self, worker: WorkerView) -> int:
        return len(self._at.get(worker.id, ()))

    @property
    def number_anywhere(self) -> int:
        """Lines that wait for any worker."""
        return len(self._anywhere)

    def _file(self, line: Line) -> None:
        key = (line.head.demand.order, line.digest)
        if line.at is None:
            self._anywhere.add(key)
        else:
            self._at.setdefault(line.at.id, SortedList()).add(key)
            self._assigned.add(key)

    def _unfile(self, line: Line) -> None:
        key = (line.head.demand.order, line.digest)
        if line.at is None:
            self._anywhere.remove(key)
            return
        self._assigned.remove(key)
        keys = self._at[line.at.id]
        keys.remove(key)
        if not keys:
            del self._at[line.at.id]
