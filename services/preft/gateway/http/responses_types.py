"""The reply of /v1/responses as types, for the schemas in /openapi.json. `responses_shape` writes it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ConfigDict, with_config
from typing_extensions import TypedDict

from preft.gateway.http.reply_types import CachedTokens, ChatLogprob

_strict = with_config(ConfigDict(extra="forbid"))

Status = Literal["in_progress", "completed", "incomplete"]


@_strict
class ReasoningText(TypedDict):
    type: Literal["reasoning_text"]
    text: str


@_strict
class ReasoningOutput(TypedDict):
    id: str
    type: Literal["reasoning"]
    summary: list[Any]
    content: list[ReasoningText]
    encrypted_content: None
    status: Status


@_strict
class OutputText(TypedDict):
    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[ChatLogprob]


@_strict
class MessageOutput(TypedDict):
    id: str
    type: Literal["message"]
    status: Status
    role: Literal["assistant"]
    content: list[OutputText]


@_strict
class FunctionCallOutput(TypedDict):
    id: str
    type: Literal["function_call"]
    status: Status
    call_id: str
    name: str
    arguments: str


@_strict
class InputTokens(CachedTokens):
    cache_write_tokens: int


@_strict
class OutputTokens(TypedDict):
    reasoning_tokens: int


@_strict
class ResponseUsage(TypedDict):
    input_tokens: int
    input_tokens_details: InputTokens
    output_tokens: int
    output_tokens_details: OutputTokens
    total_tokens: int


@_strict
class IncompleteDetails(TypedDict):
    reason: Literal["max_output_tokens"]


@_strict
class ResponsesReply(TypedDict):
    """POST /v1/responses. Fields of the request are repeated."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["completed", "incomplete"]
    background: Literal[False]
    error: None
    incomplete_details: IncompleteDetails | None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: int | None
    model: str
    output: list[ReasoningOutput | MessageOutput | FunctionCallOutput]
    parallel_tool_calls: bool
    presence_penalty: float
    frequency_penalty: float
    previous_response_id: None
    reasoning: dict[str, str | None]
    service_tier: Literal["default"]
    store: Literal[False]
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, str]
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float
    truncation: Literal["auto", "disabled"]
    usage: ResponseUsage
    user: str | None
    metadata: dict[str, str]
