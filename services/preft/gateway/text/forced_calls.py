"""Reads tool calls from outputs that a grammar forces to be calls: see `bodies.tool_choice` for their form.

Reads each character once. Arguments stay the text that the model wrote.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Protocol

from preft.gateway.text.choice import ToolCallDelta
from preft.gateway.text.parsing import Parts

NewId = Callable[[str, int], str]  # of a call's name and position
_HEAD = re.compile(
    r'\s*(?:\[|\}\s*,)\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"parameters"\s*:\s*(?=\S)', re.DOTALL
)
_STRUCTURE = re.compile(r'["\\{}\[\]]')
MAX_HEAD = 1 << 16  # characters before a call's arguments


class ForcedCalls(Protocol):
    """Takes the content piece by piece. Pieces that are no part of a call stay content."""

    def push(self, text: str, *, finished: bool) -> Parts: ...


class NamedCall:
    """The whole output is the arguments of one call."""

    def __init__(self, name: str, new_id: NewId) -> None:
        self._name, self._new_id = name, new_id
        self._begun = False

    def push(self, text: str, *, finished: bool) -> Parts:
        if not text:
            return Parts()
        if self._begun:
            return Parts(tool_calls=(ToolCallDelta(0, text),))
        self._begun = True
        return Parts(tool_calls=(ToolCallDelta(0, text, self._new_id(self._name, 0), self._name),))


class CallArray:
    """The output is a JSON array of calls. What doesn't begin as one is content, and so is a call cut off too early."""

    def __init__(self, new_id: NewId) -> None:
        self._new_id = new_id
        self._calls = 0
        self._head = ""  # text before the next arguments
        self._is_content = False
        self._in_arguments = False
        self._depth = 0
        self._in_string = False
        self._escaped = False

    def push(self, text: str, *, finished: bool) -> Parts:
        if self._in_arguments and not self._escaped and _STRUCTURE.search(text) is None:  # nearly always
            return Parts(tool_calls=(ToolCallDelta(self._calls - 1, text),)) if text else Parts()
        if self._is_content:
            return Parts(text)
        deltas: list[ToolCallDelta] = []
        rest = text
        while rest:
            rest = self._read_arguments(rest, deltas) if self._in_arguments else self._read_head(rest, deltas)
        content = ""
        if self._head and not self._calls and (finished or not self._may_begin(self._head)):
            content, self._head, self._is_content = self._head, "", True
        return Parts(content, tool_calls=tuple(deltas))

    def _next_call(self, head: str) -> tuple[str, int] | None:
        """The name of the call whose arguments follow a beginning of `head`, and the beginning's length."""
        found = _HEAD.match(head)
        return None if found is None else (json.loads(found[1]), found.end())

    def _may_begin(self, head: str) -> bool:
        """Whether `head` may be the beginning of a first call's head."""
        return head.lstrip()[:1] in ("", "[") and len(head) <= MAX_HEAD

    def _read_head(self, text: str, deltas: list[ToolCallDelta]) -> str:
        """Takes text up to the next arguments. Returns what follows."""
        self._head += text
        found = self._next_call(self._head)
        if found is None:
            return ""
        name, length = found
        rest, self._head = self._head[length:], ""
        deltas.append(ToolCallDelta(self._calls, "", self._new_id(name, self._calls), name))
        self._calls += 1
        self._in_arguments = True
        return rest

    def _read_arguments(self, text: str, deltas: list[ToolCallDelta]) -> str:
        """Takes text up to the arguments' end. Returns what follows."""
        end = self._end_of_value(text)
        taken = text if end is None else text[:end]
        if taken:
            last = deltas[-1] if deltas else None
            if last is not None and last.position == self._calls - 1:
                deltas[-1] = ToolCallDelta(last.position, last.arguments + taken, last.id, last.name)
            else:
                deltas.append(ToolCallDelta(self._calls - 1, taken))
        if end is None:
            return ""
        self._in_arguments = False
        return text[end:]

    def _end_of_value(self, text: str) -> int | None:
        """Where the value ends that `text` continues; None if `text` is all inside it."""
        start = 0
        if self._escaped and text:
            self._escaped, start = False, 1
        position = start
        while match := _STRUCTURE.search(text, position):
            position = match.end()
            character = match[0]
            if self._in_string:
                if character == "\\":
                    if position == len(text):
                        self._escaped = True
                    position += 1
                elif character == '"':
                    self._in_string = False
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                if self._depth == 0:
                    return match.start()  # the end of the call, behind a number or another plain value
                self._depth -= 1
                if self._depth == 0:
                    return position
        return None
