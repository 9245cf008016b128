"""The HTTP API's replies as types: for the dicts that are sent, and for the schemas in /openapi.json.

Tokens are never sent through these types: `reply` writes token JSON directly.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, NotRequired

from pydantic import ConfigDict, Field, with_config
from typing_extensions import TypedDict

_strict = with_config(ConfigDict(extra="forbid"))

State = Literal["slot", "host", "loading"]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


@_strict
class ErrorDetail(TypedDict):
    message: str
    type: str
    param: str | None
    code: str


@_strict
class ErrorReply(TypedDict):
    """The body of every error."""

    error: ErrorDetail


@_strict
class CachedTokens(TypedDict):
    cached_tokens: int


@_strict
class ReasoningTokens(TypedDict):
    reasoning_tokens: int


@_strict
class Usage(TypedDict):
    """`completion_tokens_details` comes from servers that parse reasoning."""

    prompt_tokens: int
    total_tokens: int
    completion_tokens: int
    prompt_tokens_details: NotRequired[CachedTokens]
    completion_tokens_details: NotRequired[ReasoningTokens]


@_strict
class CompletionLogprobs(TypedDict):
    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


@_strict
class PromptLogprob(TypedDict):
    logprob: float
    rank: int
    decoded_token: str


PromptLogprobList = list[dict[str, PromptLogprob] | None] | None
"""For each token of the prompt: its own value and the most likely ones, by token id. The first token has none."""


@_strict
class CompletionChoice(TypedDict):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]
    stop_reason: str | int | None
    token_ids: NotRequired[list[int]]
    prompt_token_ids: NotRequired[list[int]]
    prompt_logprobs: PromptLogprobList


@_strict
class CompletionReply(TypedDict):
    """POST /v1/completions. `system_fingerprint` is the beginning of the served adapter version's digest."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str | None
    choices: list[CompletionChoice]
    service_tier: None
    usage: Usage


@_strict
class TopLogprob(TypedDict):
    token: str
    logprob: float
    bytes: list[int]


@_strict
class ChatLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


@_strict
class ChatLogprobs(TypedDict):
    content: list[ChatLogprob]


@_strict
class CalledFunction(TypedDict):
    """`arguments` is JSON text as the model wrote it."""

    name: str
    arguments: str


@_strict
class ToolCallReply(TypedDict):
    id: str
    type: Literal["function"]
    function: CalledFunction


@_strict
class ChatMessage(TypedDict):
    """`content` is null if there are only reasoning or tool calls."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning: NotRequired[str]
    tool_calls: NotRequired[list[ToolCallReply]]


@_strict
class ChatChoice(TypedDict):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]
    stop_reason: str | int | None
    token_ids: NotRequired[list[int]]


@_strict
class ChatReply(TypedDict):
    """POST /v1/chat/completions. `system_fingerprint` is the beginning of the served adapter version's digest."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str | None
    choices: list[ChatChoice]
    service_tier: None
    usage: Usage
    prompt_token_ids: NotRequired[list[int]]
    prompt_text: NotRequired[str]
    prompt_logprobs: PromptLogprobList


@_strict
class TokenizeReply(TypedDict):
    """`token_strs` are the vocabulary's own spellings, such as "Ġhello"."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


@_strict
class DetokenizeReply(TypedDict):
    prompt: str


@_strict
class VersionReply(TypedDict):
    version: str


@_strict
class ModelCard(TypedDict):
    """The base model or an adapter. An adapter's `parent` is the base model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: Literal["preft"]
    root: str
    parent: str | None
    max_model_len: int | None


@_strict
class ModelList(TypedDict):
    object: Literal["list"]
    data: list[ModelCard]


@_strict
class AdapterReply(TypedDict):
    """One entry of the catalog. `size` in bytes, `created` in seconds since 1970."""

    name: str
    object: Literal["adapter"]
    version: int
    digest: Digest
    source: str
    kind: str
    rank: int
    size: int
    prefill_only: bool
    pinned: bool
    created: int
    warnings: list[str]


@_strict
class PlaceReply(TypedDict):
    """One worker's copy of the adapter. `prompts` counts prompts under the adapter that aren't computed."""

    worker: str
    state: State
    prompts: int


@_strict
class ShownAdapter(AdapterReply):
    workers: list[PlaceReply]


@_strict
class RemovedAdapter(AdapterReply):
    deleted: bool


@_strict
class AdapterList(TypedDict):
    """One page. `total` counts the matching entries on all pages."""

    object: Literal["list"]
    data: list[AdapterReply]
    first_id: str | None
    last_id: str | None
    has_more: bool
    total: int


@_strict
class HealthReply(TypedDict):
    status: str


@_strict
class WorkerStage(TypedDict):
    id: str
    role: str
    state: str


@_strict
class NotReadyReply(TypedDict):
    status: str
    reason: str
    workers: list[WorkerStage]


@_strict
class WorkersReply(TypedDict):
    workers: list[dict[str, Any]]
