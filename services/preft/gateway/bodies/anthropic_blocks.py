"""Messages and content blocks of Anthropic's API, strictly checked, and the chat messages that they become."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from preft.core.errors import InvalidRequest
from preft.gateway.bodies.converted import Turns
from preft.gateway.bodies.messages import MAX_MESSAGES
from preft.gateway.bodies.parse import checked, without_nulls
from preft.gateway.bodies.schemas import NonEmpty, Strict

BILLING = "x-anthropic-billing-header"
"""The beginning of Claude Code's system text that differs in each request. As in vLLM, no prompt has such a text."""


class _Block(Strict):
    """`cache_control` has no effect: prefixes are cached anyway."""

    cache_control: dict[str, Any] | None = None


class TextBlock(_Block):
    """`citations` are those of an earlier reply."""

    type: Literal["text"]
    text: str
    citations: list[Any] | None = None


class ThinkingBlock(_Block):
    """The assistant's reasoning. `signature` isn't checked."""

    type: Literal["thinking"]
    thinking: str
    signature: str | None = None


class ToolUseBlock(_Block):
    """A call that the model has made. `caller` is that of an earlier reply."""

    type: Literal["tool_use"]
    id: NonEmpty
    name: NonEmpty
    input: dict[str, Any]
    caller: dict[str, Any] | None = None

    def as_chat(self) -> dict[str, Any]:
        arguments = json.dumps(self.input, ensure_ascii=False)
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": arguments}}


class ToolResultBlock(_Block):
    """The result of a call. `is_error` has no effect, as in vLLM: templates have no place for it."""

    type: Literal["tool_result"]
    tool_use_id: NonEmpty
    content: str | list[TextBlock] = ""
    is_error: bool | None = None

    def as_chat(self) -> dict[str, Any]:
        content = self.content
        text = content if isinstance(content, str) else "\n".join(block.text for block in content)
        return {"role": "tool", "tool_call_id": self.tool_use_id, "content": text}


Block = TextBlock | ThinkingBlock | ToolUseBlock | ToolResultBlock
Kinds = Mapping[str, type[Block]]
Role = Literal["user", "assistant", "system"]

_TEXT: Kinds = {"text": TextBlock}
_KINDS: Mapping[str, Kinds] = {
    "user": {**_TEXT, "tool_result": ToolResultBlock},
    "assistant": {**_TEXT, "thinking": ThinkingBlock, "tool_use": ToolUseBlock},
    "system": _TEXT,
}


class InputMessage(Strict):
    """One message. Inside a conversation, `system` is allowed too, as in vLLM."""

    role: Role
    content: str | list[Block]

    def join(self, turns: Turns, place: str) -> None:
        """Adds the chat messages that mean the same: each tool result is one."""
        if isinstance(self.content, str):
            turns.add({"role": self.role, "content": self.content}, place)
        elif self.role == "assistant":
            _join_assistant(self.content, turns, place)
        elif self.role == "system":
            if text := system_text(self.content):
                turns.add({"role": "system", "content": text}, place)
        else:
            _join_user(self.content, turns, place)


def read_messages(value: object) -> list[InputMessage]:
    """The checked `messages`. Raises InvalidRequest that names the block. All readers of this module do."""
    if not isinstance(value, list) or not value:
        raise InvalidRequest("messages must be a list of messages, and not empty.", "messages")
    if len(value) > MAX_MESSAGES:
        raise InvalidRequest(f"messages holds {len(value)} items, the limit is {MAX_MESSAGES}.", "messages")
    return [_read_message(message, f"messages[{number}]") for number, message in enumerate(value)]


def read_system(value: object) -> str | list[Block]:
    return value if isinstance(value, str) else _read_blocks(value, _TEXT, "system")


def system_text(content: str | Sequence[Block]) -> str:
    """One text, as in vLLM: the texts without anything between them."""
    texts = [content] if isinstance(content, str) else [block.text for block in content if isinstance(block, TextBlock)]
    return "".join(text for text in texts if not text.startswith(BILLING))


def _read_message(value: object, place: str) -> InputMessage:
    if not isinstance(value, dict):
        raise InvalidRequest(f"{place} must be an object.", place)
    given = without_nulls(value)
    kinds = _KINDS.get(role) if isinstance(role := given.get("role"), str) else None
    if kinds is not None and not isinstance(given.get("content", ""), str):
        given["content"] = _read_blocks(given["content"], kinds, f"{place}.content")
    return checked(InputMessage, given, place)


def _read_blocks(value: object, kinds: Kinds, place: str) -> list[Block]:
    if not isinstance(value, list):
        raise InvalidRequest(f"{place} must be a string or a list of blocks.", place)
    return [_read_block(block, kinds, f"{place}[{number}]") for number, block in enumerate(value)]


def _read_block(value: object, kinds: Kinds, place: str) -> Block:
    if not isinstance(value, dict):
        raise InvalidRequest(f"{place} must be an object.", place)
    given = without_nulls(value)
    name = given.get("type")
    kind = kinds.get(name) if isinstance(name, str) else None
    if kind is None:
        known = ", ".join(kinds)
        raise InvalidRequest(
            f"{place}: blocks of type {repr(name)[:80]} aren't supported here, only {known}.", f"{place}.type"
        )
    if kind is ToolResultBlock and not isinstance(given.get("content", ""), str):
        given["content"] = _read_blocks(given["content"], _TEXT, f"{place}.content")
    return checked(kind, given, place)


def _join_assistant(blocks: Sequence[Block], turns: Turns, place: str) -> None:
    message = turns.add({"role": "assistant"}, place)
    texts: list[str] = []
    thoughts: list[str] = []
    for number, block in enumerate(blocks):
        if isinstance(block, TextBlock):
            texts.append(block.text)
        elif isinstance(block, ThinkingBlock):
            thoughts.append(block.thinking)
        elif isinstance(block, ToolUseBlock):
            turns.add_call(message, block.as_chat(), f"{place}.content[{number}]")
    if any(texts):
        message["content"] = _content(texts)
    if any(thoughts):
        message["reasoning"] = "".join(thoughts)


def _join_user(blocks: Sequence[Block], turns: Turns, place: str) -> None:
    texts: list[str] = []
    results = 0
    for number, block in enumerate(blocks):
        if isinstance(block, TextBlock):
            texts.append(block.text)
        elif isinstance(block, ToolResultBlock):
            if texts:
                raise InvalidRequest(f"{place}: tool results must come before the texts.", f"{place}.content[{number}]")
            results += 1
            turns.add(block.as_chat(), f"{place}.content[{number}]")
    if texts or not results:
        turns.add({"role": "user", "content": _content(texts)}, place)


def _content(texts: Sequence[str]) -> str | list[dict[str, str]]:
    return texts[0] if len(texts) == 1 else [{"type": "text", "text": text} for text in texts if text]
