"""Parsers of an invented form of output, for tests of the gateway: implement `gateway.text.parsing`.

Text inside `(...)` is reasoning; `@name;arguments;` is a call. One character is read at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from preft.gateway.text.choice import ToolCallDelta
from preft.gateway.text.parsing import Asked, CallTag, Parts


class FakeParser:
    """Implements `OutputParser`."""

    takes_many = True

    def __init__(self, reads_calls: bool = True) -> None:
        self._starts = {"(": "reasoning", "@": "name"} if reads_calls else {"(": "reasoning"}
        self._state = "content"
        self._calls = 0
        self._name = ""
        self._reasoned = 0

    def push(self, text: str, token_ids: Sequence[int], *, finished: bool) -> Parts:
        parts = [self._next(character) for character in text]
        return Parts(
            "".join(part.content for part in parts),
            "".join(part.reasoning for part in parts),
            tuple(call for part in parts for call in part.tool_calls),
        )

    def parse(self, text: str, token_ids: Sequence[int]) -> Parts:
        return self.push(text, token_ids, finished=True)

    def reasoning_tokens(self, token_ids: Sequence[int]) -> int:
        return self._reasoned

    def _next(self, character: str) -> Parts:
        if self._state == "content":
            self._state = self._starts.get(character, "content")
            return Parts(character) if self._state == "content" else Parts()
        if self._state == "reasoning":
            if character == ")":
                self._state = "content"
                return Parts()
            self._reasoned += 1
            return Parts(reasoning=character)
        if character != ";":
            if self._state == "name":
                self._name += character
                return Parts()
            return Parts(tool_calls=(ToolCallDelta(self._calls - 1, character),))
        if self._state == "name":
            self._state, self._calls = "arguments", self._calls + 1
            begun, self._name = self._name, ""
            return Parts(tool_calls=(ToolCallDelta(self._calls - 1, "", f"id-{self._calls}", begun),))
        self._state = "content"
        return Parts()


@dataclass
class FakeRequestParsers:
    """Implements `RequestParsers`."""

    asked: Asked
    end: int | None = None
    skip_special_tokens: bool = True
    strict_tag: str | None = None
    call_tags: tuple[CallTag, ...] = ()
    reads_calls: bool = True

    def reasoning_end(self, prompt: Sequence[int]) -> int | None:
        return self.end

    def start(self, prompt: Sequence[int]) -> FakeParser:
        return FakeParser(self.reads_calls)


@dataclass
class FakeParsers:
    """Implements `Parsers`. `asked` holds what requests asked, in order; `end` is the token that ends reasoning."""

    reads_calls: bool = True
    reads_reasoning: bool = True
    end: int | None = None
    strict_tag: str | None = None
    call_tags: tuple[CallTag, ...] = ()
    asked: list[Asked] = field(default_factory=list)

    def of(self, asked: Asked) -> FakeRequestParsers | None:
        self.asked.append(asked)
        if not self.reads_reasoning and not asked.tools:
            return None
        strict_tag, call_tags = (self.strict_tag, self.call_tags) if asked.may_call else (None, ())
        return FakeRequestParsers(asked, self.end, not asked.tools, strict_tag, call_tags)

    def of_reasoning(self, asked: Asked) -> FakeRequestParsers | None:
        self.asked.append(asked)
        return FakeRequestParsers(asked, self.end, reads_calls=False) if self.reads_reasoning else None

    def call_id(self, name: str, position: int, earlier: int) -> str:
        return f"functions.{name}:{earlier + position}"
