"""Workers in the order of their load, and adapters' places on a hash ring, for thousands of workers.

Both structures cost little per change, so that a choice never sorts or hashes all workers.
"""

from __future__ import annotations

from bisect import bisect, bisect_left, insort
from collections import OrderedDict
from collections.abc import Iterator
from hashlib import blake2b
from typing import Generic, TypeVar

T = TypeVar("T")

POINTS = 64  # of one worker on the ring: with 1,000 workers, shares differ by some 12%


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
        self._points: list[tuple[int, str]] = []
        self._members: set[str] = set()
        self._walked: dict[tuple[int, int], tuple[str, ...]] = {}  # since the last change of members

    def add(self, member: str) -> None:
        if member not in self._members:
            self._members.add(member)
            self._walked.clear()
            self._points += _points_of(member)
            self._points.sort()

    def remove(self, member: str) -> None:
        if member in self._members:
            self._members.remove(member)
            self._walked.clear()
            kept, begin = list[tuple[int, str]](), 0
            for point in sorted(_points_of(member)):
                end = bisect_left(self._points, point)
                kept += self._points[begin:end]
                begin = end + 1
            self._points = kept + self._points[begin:]

    def places(self, key: str, number: int) -> tuple[str, ...]:
        """The first members, each once and at most `number`, in the order in which the ring meets them from `key`."""
        start = bisect(self._points, (_hash(key), ""))
        walked = self._walked.get((start, number))
        if walked is None:
            walked = self._walked[start, number] = self._walk(start, min(number, len(self._members)))
        return walked

    def _walk(self, start: int, number: int) -> tuple[str, ...]:
        seen: dict[str, None] = {}
        for position in range(start, start + len(self._points)):
            if len(seen) == number:
                break
            seen[self._points[position % len(self._points)][1]] = None
        return tuple(seen)


def _points_of(member: str) -> list[tuple[int, str]]:
    return [(_hash(f"{member} {number}"), member) for number in range(POINTS)]


def _hash(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big")
