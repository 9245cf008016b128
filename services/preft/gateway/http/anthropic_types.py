"""The replies of Anthropic's API as types, for the schemas in /openapi.json. `anthropic_shape` writes them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ConfigDict, with_config
from typing_extensions import TypedDict

_strict = with_config(ConfigDict(extra="forbid"))


@_strict
class AnthropicErrorDetail(TypedDict):
    type: str
    message: str


@_strict
class AnthropicErrorReply(TypedDict):
    """The body of every error of Anthropic's API."""

    type: Literal["error"]
    error: AnthropicErrorDetail


@_strict
class TextReply(TypedDict):
    type: Literal["text"]
    text: str


@_strict
class ThinkingReply(TypedDict):
    type: Literal["thinking"]
    thinking: str
    signature: str


@_strict
class ToolUseReply(TypedDict):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


@_strict
class MessageUsage(TypedDict):
    """`input_tokens` without those that were found in a prefix cache."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int


@_strict
class MessageReply(TypedDict):
    """POST /v1/messages."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[TextReply | ThinkingReply | ToolUseReply]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]
    stop_sequence: str | None
    usage: MessageUsage


@_strict
class TokenCountReply(TypedDict):
    """POST /v1/messages/count_tokens."""

    input_tokens: int
