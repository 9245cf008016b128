"""The input items of the Responses API, strictly checked, and the chat messages that they become.

One turn of the assistant is several items here (reasoning, text, function calls), and one chat message. The rules of
joining are vLLM's.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, PlainValidator

from preft.core.errors import InvalidRequest
from preft.gateway.bodies.converted import Turns
from preft.gateway.bodies.messages import MAX_MESSAGES, ContentPart
from preft.gateway.bodies.parse import checked, without_nulls
from preft.gateway.bodies.schemas import NonEmpty, Strict

Status = Literal["in_progress", "completed", "incomplete"]
# The chat body checks content.
Text = Annotated[Any, PlainValidator(lambda value: value, json_schema_input_type=str | list[str | ContentPart])]


class _Item(Strict):
    id: str | None = None
    status: Status | None = None

    def join(self, turns: Turns, place: str) -> None:
        """Adds the item's content to `turns`: as a new message, or to the last one if both are the assistant's."""
        raise NotImplementedError


class MessageItem(_Item):
    """A message. `phase` is OpenAI's mark of an assistant's message, which has no effect."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Text
    phase: Literal["commentary", "final_answer"] | None = None

    def join(self, turns: Turns, place: str) -> None:
        if self.role == "assistant" and (last := _assistant(turns)) is not None and "content" not in last:
            turns.move(place)
            last["content"] = self.content
        else:
            turns.add({"role": self.role, "content": self.content}, place)


class FunctionCallItem(_Item):
    """A call that the model has made."""

    type: Literal["function_call"]
    call_id: NonEmpty
    name: NonEmpty
    arguments: str

    def join(self, turns: Turns, place: str) -> None:
        message = _assistant(turns)
        if message is None:
            message = turns.add({"role": "assistant"}, place)
        function = {"name": self.name, "arguments": self.arguments}
        turns.add_call(message, {"id": self.call_id, "type": "function", "function": function}, place)


class FunctionCallOutputItem(_Item):
    """The result of a call."""

    type: Literal["function_call_output"]
    call_id: NonEmpty
    output: Text

    def join(self, turns: Turns, place: str) -> None:
        turns.add({"role": "tool", "tool_call_id": self.call_id, "content": self.output}, place, f"{place}.output")


class SummaryText(Strict):
    type: Literal["summary_text"]
    text: str


class ReasoningText(Strict):
    type: Literal["reasoning_text"]
    text: str


class ReasoningItem(_Item):
    """The model's thoughts before its answer. A summary counts if there is no other text."""

    type: Literal["reasoning"]
    summary: list[SummaryText] = Field(default_factory=list)
    content: list[ReasoningText] = Field(default_factory=list)

    def join(self, turns: Turns, place: str) -> None:
        thoughts = "".join(part.text for part in self.content) or "\n".join(part.text for part in self.summary)
        if not thoughts:
            return
        message = _assistant(turns)
        if message is None or "reasoning" in message:
            message = turns.add({"role": "assistant"}, place)
        message["reasoning"] = thoughts


Item = MessageItem | FunctionCallItem | FunctionCallOutputItem | ReasoningItem
_KINDS: dict[str, type[Item]] = {
    "message": MessageItem,
    "function_call": FunctionCallItem,
    "function_call_output": FunctionCallOutputItem,
    "reasoning": ReasoningItem,
}
_REFUSED = {
    "item_reference": "responses aren't stored; send the item itself",
    "compaction": "encrypted content can't be read",
}


def read_input(value: object) -> str | list[Item]:
    """The checked `input`. Raises InvalidRequest that names the item."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise InvalidRequest("input must be a string or a list of items.", "input")
    if not value:
        raise InvalidRequest("input must not be empty.", "input")
    if len(value) > MAX_MESSAGES:
        raise InvalidRequest(f"input holds {len(value)} items, the limit is {MAX_MESSAGES}.", "input")
    return [_read_item(item, f"input[{number}]") for number, item in enumerate(value)]


def _read_item(value: object, place: str) -> Item:
    if not isinstance(value, dict):
        raise InvalidRequest(f"{place} must be an object.", place)
    given = without_nulls(value)
    name = given.get("type", "message")
    if name == "reasoning" and given.pop("encrypted_content", None):
        raise InvalidRequest(f"{place}: encrypted content can't be read.", f"{place}.encrypted_content")
    kind = _KINDS.get(name) if isinstance(name, str) else None
    if kind is None:
        reason = _REFUSED.get(name, "") if isinstance(name, str) else ""
        shown = repr(name)[:80]
        raise InvalidRequest(
            f"{place}: items of type {shown} aren't supported{reason and f': {reason}'}.", f"{place}.type"
        )
    return checked(kind, given, place)


def _assistant(turns: Turns) -> dict[str, Any] | None:
    """The last message, if it is the assistant's."""
    last = turns.messages[-1] if turns.messages else None
    return last if last is not None and last["role"] == "assistant" else None


ITEMS: tuple[type[BaseModel], ...] = (MessageItem, FunctionCallItem, FunctionCallOutputItem, ReasoningItem)
