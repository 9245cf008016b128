"""What the calls give back: frozen values, equal over HTTP and gRPC."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

from preft_client.errors import BadReply

FinishReason = Literal["stop", "length", "tool_calls"]
Form = TypeVar("Form")


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token's log probability, and those of the most likely tokens at its position, by token id."""

    token_id: int
    logprob: float
    top: Mapping[int, float]


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """The next part of a choice's tool call number `position`. The first part has `id` and `name`."""

    position: int
    arguments: str = ""
    id: str = ""
    name: str = ""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A whole call of a tool. `arguments` is JSON text as the model wrote it."""

    id: str
    name: str
    arguments: str

    def read_arguments(self) -> dict[str, Any]:
        """The arguments as an object. Raises BadReply if the model wrote something else, or was cut off."""
        try:
            value = json.loads(self.arguments or "{}")
        except ValueError as error:
            raise BadReply(f"the arguments of the call of {self.name!r} are no JSON: {error}") from error
        if not isinstance(value, dict):
            raise BadReply(f"the arguments of the call of {self.name!r} are no JSON object")
        return value


@dataclass(frozen=True, slots=True)
class Delta:
    """New text and tokens of one choice. `finish_reason` is set on a choice's last delta.

    `stop_token_id` is the request's own stop token that ended the choice, if one did. `reasoning` and `tool_calls` are
    the parts of a chat's output that aren't in `text`.
    """

    text: str
    token_ids: tuple[int, ...] = ()
    index: int = 0
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    reasoning: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()


@dataclass(frozen=True, slots=True)
class Choice:
    """One whole answer. `finish_reason` is None if the stream was left before the choice's end."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    stop_token_id: int | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()

    @property
    def message(self) -> dict[str, Any]:
        """The answer as the assistant's message of the next chat."""
        message: dict[str, Any] = {"role": "assistant", "content": self.text}
        if self.tool_calls:
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in self.tool_calls
            ]
        return message


@dataclass(frozen=True, slots=True)
class Usage:
    """Counts of tokens. `cached_tokens` of the prompt were found in a prefix cache."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Generation:
    """The answer to one prompt or chat: `n` choices. The properties are the first choice's.

    `adapter_digest` is the beginning (16 digits) of the digest of the adapter version that answered; "" for the base
    model.
    """

    choices: tuple[Choice, ...]
    usage: Usage
    adapter_digest: str = ""

    @property
    def text(self) -> str:
        return self.choices[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.choices[0].token_ids

    @property
    def finish_reason(self) -> FinishReason | None:
        return self.choices[0].finish_reason

    @property
    def logprobs(self) -> tuple[TokenLogprob, ...]:
        return self.choices[0].logprobs

    @property
    def reasoning(self) -> str:
        return self.choices[0].reasoning

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        return self.choices[0].tool_calls

    @property
    def message(self) -> dict[str, Any]:
        return self.choices[0].message


@dataclass(frozen=True, slots=True)
class Parsed(Generic[Form]):
    """An answer in the wanted form, and the generation that it was read from."""

    value: Form
    generation: Generation


@dataclass(frozen=True, slots=True)
class Adapter:
    """One entry of the catalog: the version that `name` points to now.

    `digest` (sha256 over configuration and weights) is the content's identity. `version` counts the name's contents
    from 1 on. `size` is in bytes. `warnings` are sentences for the adapter's owner.
    """

    name: str
    version: int
    digest: str
    source: str
    kind: str
    rank: int
    size: int
    prefill_only: bool
    pinned: bool
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class AdapterPage:
    """One page of the catalog, by name. `total` counts the matching entries of all pages."""

    adapters: tuple[Adapter, ...]
    has_more: bool
    total: int


@dataclass(frozen=True, slots=True)
class AdapterPlace:
    """One worker's copy of an adapter. `prompts` counts prompts under the adapter that aren't computed yet."""

    worker: str
    state: str  # "slot", "host" or "loading"
    prompts: int


@dataclass(frozen=True, slots=True)
class Worker:
    """A worker as the gateway sees it. `details` holds everything that the server says of it."""

    id: str
    role: str  # "prefill", "decode" or "colocated"
    state: str  # "starting", "ready", "draining" or "dead"
    address: str
    pid: int
    running: int  # requests
    kv_blocks: int
    kv_blocks_used: int
    seconds_since_heard: float
    details: Mapping[str, object] = field(repr=False)


@dataclass(slots=True)
class Facts:
    """What a stream tells beside its deltas. A driver's decoder fills it while it reads."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    adapter_digest: str = ""


@dataclass(slots=True)
class Joined:
    """Joins the deltas of a stream."""

    facts: Facts = field(default_factory=Facts)
    _choices: dict[int, list[Delta]] = field(default_factory=dict)

    def add(self, delta: Delta) -> None:
        self._choices.setdefault(delta.index, []).append(delta)

    def generation(self) -> Generation:
        """What has arrived so far. There is a choice 0 in any case."""
        choices = tuple(_joined(index, deltas) for index, deltas in sorted(self._choices.items()))
        facts = self.facts
        usage = Usage(facts.prompt_tokens, sum(len(choice.token_ids) for choice in choices), facts.cached_tokens)
        return Generation(choices or (_joined(0, []),), usage, facts.adapter_digest)


def _joined(index: int, deltas: list[Delta]) -> Choice:
    last = deltas[-1] if deltas else Delta("")
    return Choice(
        index,
        "".join([delta.text for delta in deltas]),
        tuple([token_id for delta in deltas for token_id in delta.token_ids]),
        last.finish_reason,
        last.stop_token_id,
        tuple([entry for delta in deltas for entry in delta.logprobs]),
        "".join([delta.reasoning for delta in deltas]),
        _joined_calls([part for delta in deltas for part in delta.tool_calls]),
    )


def _joined_calls(parts: list[ToolCallDelta]) -> tuple[ToolCall, ...]:
    calls: dict[int, list[ToolCallDelta]] = {}
    for part in parts:
        calls.setdefault(part.position, []).append(part)
    return tuple(
        ToolCall(*("".join([getattr(part, name) for part in own]) for name in ("id", "name", "arguments")))
        for _, own in sorted(calls.items())
    )
