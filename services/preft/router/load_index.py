"""Workers in the order of their load, and adapters' places on a hash ring, for thousands of workers.

Both structures cost little per change, so that a choice never sorts or hashes all workers.
"""

from __future__ import annotations

from bisect import insort
from collections import OrderedDict
from collections.abc import Iterator
from hashlib import blake2b
from itertools import count
from typing import Generic, TypeVar

import numpy as np

T = TypeVar("T")

POINTS = 64  # of one worker on the ring: with 1,000 workers, shares differ by some 12%
WALKS = 8192  # that are remembered: all are forgotten at once, in a fraction of a millisecond


class LoadIndex(Generic[T]):
    """Items by load level, lowest first; within a level, the item whose load changed longest ago comes first."""

    def __init__(self) -> None:
        self._levels: dict[int, OrderedDict[str, T]] = {}
        self._order: list[int] = []  # of the levels
        self._level_of: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._level_of)

    def __contains__(self, key: str) -> bool:
        return key in self._level_of

    def __iter__(self) -> Iterator[T]:
        for level in self._order:
            yield from self._levels[level].values()

    def put(self, key: str, item: T, level: int) -> None:
        """Adds the item, or moves it to `level`."""
        before = self._level_of.get(key)
        if before != level:
            if before is not None:
                self._take(key, before)
            self._level_of[key] = level
        items = self._levels.get(level)
        if items is None:
            items = self._levels[level] = OrderedDict()
            insort(self._order, level)
        items[key] = item
        items.move_to_end(key)

    def remove(self, key: str) -> None:
        """Removes the item, if it is there."""
        level = self._level_of.pop(key, None)
        if level is not None:
            self._take(key, level)

    def _take(self, key: str, level: int) -> None:
        items = self._levels[level]
        del items[key]
        if not items:
            del self._levels[level]
            self._order.remove(level)


class HashRing:
    """Consistent hashing (Karger et al., 1997): if a member comes or goes, only its own share of keys moves."""

    def __init__(self) -> None:
        self._points = np.empty(0, np.uint64)  # ascending
        self._owners = np.empty(0, np.int64)  # of each point: the member's number
        self._numbers: dict[str, int] = {}
        self._members: dict[int, str] = {}  # by number
        self._count = count()
        self._walked: dict[tuple[int, int], tuple[str, ...]] = {}  # since the last change of members

    def add(self, member: str) -> None:
        if member in self._numbers:
            return
        number = self._numbers[member] = next(self._count)
        self._members[number] = member
        points = np.array(sorted(_hash(f"{member} {point}") for point in range(POINTS)), np.uint64)
        at = np.searchsorted(self._points, points)
        self._points = np.insert(self._points, at, points)
        self._owners = np.insert(self._owners, at, number)
        self._walked.clear()

    def remove(self, member: str) -> None:
        number = self._numbers.pop(member, None)
        if number is None:
            return
        del self._members[number]
        others = self._owners != number
        self._points, self._owners = self._points[others], self._owners[others]
        self._walked.clear()

    def places(self, key: str, number: int) -> tuple[str, ...]:
        """The first members, each once and at most `number`, in the order in which the ring meets them from `key`."""
        start = int(np.searchsorted(self._points, np.uint64(_hash(key))))
        walked = self._walked.get((start, number))
        if walked is None:
            if len(self._walked) == WALKS:
                self._walked.clear()
            walked = self._walked[start, number] = self._walk(start, min(number, len(self._members)))
        return walked

    def _walk(self, start: int, number: int) -> tuple[str, ...]:
        seen: dict[int, None] = {}
        while len(seen) < number:
            some = self._owners[start : start + 2 * number].tolist()
            seen.update(dict.fromkeys(some))
            start = start + len(some) if start < len(self._owners) else 0
        return tuple(self._members[owner] for owner in list(seen)[:number])


def _hash(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big")
