"""Reads outputs that are either tool calls in the model's own form, or a text: see `gateway.calls_or_form`.

The beginning says which: an output that begins with the beginning of a call is calls.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from preft.gateway.text.forced_calls import CallArray, NewId
from preft.gateway.text.parsing import CallTag

_TOKENS = re.compile(r'"[^"]*"|[^\s"]')  # of JSON
_SPACE = r"\s*(?=\S)"
MAX_SPACE = 4096  # characters of whitespace in the beginning of a call


def is_json(tag: CallTag) -> bool:
    """Whether the whole call is a JSON object. Such a call has free whitespace between its parts."""
    return tag.begin.startswith("{")


def begin_pattern(tags: Sequence[CallTag]) -> re.Pattern[str]:
    """Matches the beginning of a call; the group's number less 1 is the tag's."""
    return re.compile("|".join(f"({_pattern(tag, tag.begin)}{_SPACE if is_json(tag) else ''})" for tag in tags))


class TaggedCalls(CallArray):
    """Implements `ForcedCalls`."""

    def __init__(self, tags: Sequence[CallTag], new_id: NewId) -> None:
        super().__init__(new_id)
        self._tags = tags
        self._first = begin_pattern(tags)
        ends = "|".join(dict.fromkeys(_pattern(tag, tag.end) for tag in tags))
        self._later = re.compile(rf"\s*(?:{ends})\s*;?\s*(?:{self._first.pattern})")
        self._begins = {"".join(tag.begin.split()) for tag in tags}
        self._longest = max(len(tag.begin) for tag in tags) + MAX_SPACE

    def _next_call(self, head: str) -> tuple[str, int] | None:
        found = (self._later if self._calls else self._first).match(head)
        return None if found is None else (self._tags[(found.lastindex or 0) - 1].name, found.end())

    def _may_begin(self, head: str) -> bool:
        shown = "".join(head.split())
        return len(head) <= self._longest and any(begin.startswith(shown) for begin in self._begins)


def _pattern(tag: CallTag, text: str) -> str:
    if not is_json(tag):
        return re.escape(text)
    return r"\s*".join(["", *map(re.escape, _TOKENS.findall(text))])
