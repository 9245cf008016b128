"""What a caller asks for, before any transport: prompt or messages, and parameters.

The server judges values. This module judges names, so that a misspelt parameter fails like a misspelt argument.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

Prompt = str | Sequence[int]
"""A text, or token ids."""

Message = Mapping[str, Any]
"""A chat message as in OpenAI's API: `{"role": "user", "content": "..."}`."""


class Parameters(TypedDict, total=False):
    """Parameters of generate, chat and their streams, with OpenAI's and vLLM's meaning. Absent: the server's default.

    `logprobs` is the number of most likely tokens to report at each position. `response_format` is OpenAI's, and so are
    a chat's `tools`, `tool_choice` and `parallel_tool_calls`. A waiting request with a lower `priority` goes first.
    `extra` takes every other parameter of the HTTP API (docs/http.md).
    """

    max_tokens: int
    min_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    seed: int
    n: int
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    logit_bias: Mapping[int, float]
    logprobs: int
    response_format: Mapping[str, Any]
    tools: Sequence[Mapping[str, Any]]
    tool_choice: str | Mapping[str, Any]
    parallel_tool_calls: bool
    priority: int
    user: str
    extra: Mapping[str, Any]


_OWN = ("model", "prompt", "messages", "stream", "stream_options", "return_token_ids", "return_tokens_as_token_ids")


@dataclass(frozen=True, slots=True)
class Asked:
    """One request for text: of `prompt`, or of `messages` if there is no prompt. `parameters` has no `extra`."""

    model: str
    prompt: str | tuple[int, ...] | None
    messages: tuple[Message, ...]
    parameters: Mapping[str, Any]
    extra: Mapping[str, Any]


def asked_prompt(model: str, prompt: Prompt, parameters: Mapping[str, Any]) -> Asked:
    """Raises TypeError for arguments that no server could serve."""
    if not isinstance(prompt, str):
        prompt = tuple(prompt)
        if not all(type(token) is int for token in prompt):
            raise TypeError("prompt must be a text or token ids")
    return Asked(model, prompt, (), *_checked(parameters))


def asked_chat(model: str, messages: Sequence[Message], parameters: Mapping[str, Any]) -> Asked:
    """Raises TypeError for arguments that no server could serve."""
    if isinstance(messages, (str, Mapping)) or not all(isinstance(message, Mapping) for message in messages):
        raise TypeError('messages must be a list of messages such as {"role": "user", "content": "..."}')
    return Asked(model, None, tuple(messages), *_checked(parameters))


def _checked(given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    extra = dict(given.get("extra") or {})
    for name in given:
        if name not in Parameters.__annotations__:
            raise TypeError(f"unexpected parameter {name!r}: parameters without an argument of their own go in extra")
    for name in extra:
        if name in Parameters.__annotations__ or name in _OWN:
            raise TypeError(f"extra can't hold {name!r}, which the client sets itself")
    return {name: value for name, value in given.items() if name != "extra" and value is not None}, extra
