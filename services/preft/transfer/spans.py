"""Which bytes of an arena are free: a pure first-fit list. Knows nothing of regions, waiting or shared memory."""

from __future__ import annotations

from bisect import bisect_left


class FreeSpans:
    """Disjoint, non-adjacent free spans `[start, end)` in ascending order. Offsets and sizes in bytes."""

    def __init__(self, capacity: int) -> None:
        self._spans: list[tuple[int, int]] = [(0, capacity)]

    @property
    def total(self) -> int:
        """Free bytes."""
        return sum(end - start for start, end in self._spans)

    def copy(self) -> FreeSpans:
        """An independent list, to try things on."""
        twin = FreeSpans(0)
        twin._spans = list(self._spans)
        return twin

    def find(self, size: int) -> int | None:
        """The lowest offset where `size` bytes are free, or None."""
        return next((start for start, end in self._spans if end - start >= size), None)

    def take(self, size: int) -> int | None:
        """Like `find`, and the bytes are free no longer."""
        for index, (start, end) in enumerate(self._spans):
            if end - start >= size:
                self._spans[index : index + 1] = [(start + size, end)] if end - start > size else []
                return start
        return None

    def give(self, start: int, size: int) -> None:
        """Makes taken bytes free again, joined with their free neighbours."""
        end = start + size
        index = bisect_left(self._spans, (start, end))
        first, last = index, index
        if index and self._spans[index - 1][1] == start:
            first, start = index - 1, self._spans[index - 1][0]
        if index < len(self._spans) and self._spans[index][0] == end:
            last, end = index + 1, self._spans[index][1]
        self._spans[first:last] = [(start, end)]
