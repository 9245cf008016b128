"""Free bytes of an arena, as a pure first-fit list. Regions, waiting and shared memory belong to `arena`."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable


class FreeSpans:
    """Disjoint, non-adjacent free spans `[start, end)` in ascending order. Offsets and sizes are in bytes."""

    def __init__(self, capacity: int) -> None:
        self._spans: list[tuple[int, int]] = [(0, capacity)]

    @property
    def total(self) -> int:
        return sum(end - start for start, end in self._spans)

    def copy(self) -> FreeSpans:
        """An independent copy for trials."""
        twin = FreeSpans(0)
        twin._spans = list(self._spans)
        return twin

    def largest(self, also: Iterable[tuple[int, int]] = ()) -> int:
        """Bytes of the largest free span if the taken spans `also` were free too. Takes n log n for n spans in all."""
        best = start = end = 0
        for next_start, next_end in sorted((*self._spans, *also)):
            if next_start != end:
                start = next_start
            end = next_end
            best = max(best, end - start)
        return best

    def find(self, size: int) -> int | None:
        """The lowest offset where `size` bytes are free, or None."""
        return next((start for start, end in self._spans if end - start >= size), None)

    def take(self, size: int) -> int | None:
        """Takes the first `size` free bytes. Returns their offset, or None."""
        for index, (start, end) in enumerate(self._spans):
            if end - start >= size:
                self._spans[index : index + 1] = [(start + size, end)] if end - start > size else []
                return start
        return None

    def give(self, start: int, size: int) -> None:
        """Frees taken bytes, and joins them with free neighbours."""
        end = start + size
        index = bisect_left(self._spans, (start, end))
        first, last = index, index
        if index and self._spans[index - 1][1] == start:
            first, start = index - 1, self._spans[index - 1][0]
        if index < len(self._spans) and self._spans[index][0] == end:
            last, end = index + 1, self._spans[index][1]
        self._spans[first:last] = [(start, end)]
