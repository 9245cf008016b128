"""Stop strings in a stream of text: finds the first completed stop string, and holds back text that may become one.

Knows no tokens. The caller says from where on matches count (`min_tokens`).
"""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Searches one choice's text for `stops` (non-empty strings).

    The stop string that is completed first, character by character, ends the text. If two end at the same place, the
    one listed first counts. `matched` names it. The text is cut before the match, or after it with `include`.
    """

    __slots__ = ("_blind", "_held", "_include", "_stops", "matched")

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        self._stops = stops
        self._include = include
        self._held = ""  # the longest end of the text that may begin a stop string
        self._blind = 0  # matches that end within so many characters of `_held` don't count
        self.matched: str | None = None

    def push(self, text: str, *, armed: bool = True) -> str:
        """Adds text and returns the text that is safe to show. With `armed` False, a match must end after this text."""
        pending = self._held + text
        if not armed:
            self._blind = len(pending)
        found = self._first_match(pending)
        if found is not None:
            start, end, self.matched = found
            self._held = ""
            return pending[: end if self._include else start]
        keep = self._held_length(pending)
        safe = len(pending) - keep
        self._held = pending[safe:]
        self._blind = max(0, self._blind - safe)
        return pending[:safe]

    def release(self) -> str:
        """Returns the held text, at the end of a text without a match."""
        held, self._held = self._held, ""
        return held

    def _first_match(self, pending: str) -> tuple[int, int, str] | None:
        best: tuple[int, int, str] | None = None
        for stop in self._stops:
            start = pending.find(stop, max(0, self._blind + 1 - len(stop)))
            if start >= 0 and (best is None or start + len(stop) < best[1]):
                best = (start, start + len(stop), stop)
        return best

    def _held_length(self, pending: str) -> int:
        longest = 0
        for stop in self._stops:
            start = pending.find(stop[0], max(0, len(pending) - len(stop) + 1))
            while start >= 0 and not stop.startswith(pending[start:]):
                start = pending.find(stop[0], start + 1)
            if start >= 0:
                longest = max(longest, len(pending) - start)
        return longest
