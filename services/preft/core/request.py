"""One request's data on its way through the cluster: sampling parameters, the request, and the resulting tokens.

All text is token ids here; only the gateway has text.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
from types import MappingProxyType
from typing import Annotated

from pydantic import Field, FiniteFloat

from preft.core.errors import InvalidRequest
from preft.core.light import light_dataclass
from preft.core.structured import StructuredOutputs

DIGEST = re.compile(r"[0-9a-f]{64}")
MAX_CHOICES = 1024  # of one request
MAX_IDS = 1024  # token ids in one parameter
INT32_MAX = 2**31 - 1
NO_BIAS: Mapping[int, float] = MappingProxyType({})


class FinishReason(StrEnum):
    """Why a choice ended, in OpenAI's terms. Engines never give TOOL_CALLS: the gateway finds the calls."""

    STOP = "stop"
    LENGTH = "length"
    TOOL_CALLS = "tool_calls"


@dataclass(frozen=True, slots=True)
class Sampling:
    """Sampling parameters with vLLM's names and meaning, for every choice of a request: the one list of them.

    A new parameter is a field here, a field of the same name in common.proto, and a field of `GenerationBody` if
    clients may set it. Everything between them goes by name. The ranges are vLLM's; `rpc.convert` checks them.

    `temperature` 0 is greedy; `top_k` 0 means all tokens; `logprobs` None means none, k means the sampled token and
    the k most likely. `prompt_logprobs` means the same for the prompt's tokens. `stop_token_ids` are the caller's;
    `eos_token_ids` are the model's and are ignored under `ignore_eos`. `max_tokens` and `min_tokens` count output
    tokens, the first one included. Choice i of a seeded request uses `seed + i`. `structured_outputs` is the form of
    every choice's text. Output has no other tokens than `allowed_token_ids`, if there are any.
    """

    max_tokens: Annotated[int, Field(ge=1, le=INT32_MAX)]
    min_tokens: Annotated[int, Field(ge=0, le=INT32_MAX)] = 0
    temperature: Annotated[FiniteFloat, Field(ge=0)] = 1.0
    top_p: Annotated[FiniteFloat, Field(ge=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0, le=INT32_MAX)] = 0
    min_p: Annotated[FiniteFloat, Field(ge=0, le=1)] = 0.0
    presence_penalty: Annotated[FiniteFloat, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[FiniteFloat, Field(ge=-2, le=2)] = 0.0
    repetition_penalty: Annotated[FiniteFloat, Field(ge=0)] = 1.0
    seed: int | None = None
    ignore_eos: bool = False
    eos_token_ids: Annotated[tuple[int, ...], Field(max_length=MAX_IDS)] = ()
    stop_token_ids: Annotated[tuple[int, ...], Field(max_length=MAX_IDS)] = ()
    logit_bias: Annotated[Mapping[int, FiniteFloat], Field(max_length=MAX_IDS)] = field(default_factory=lambda: NO_BIAS)
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    structured_outputs: StructuredOutputs | None = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    allowed_token_ids: Annotated[tuple[int, ...], Field(max_length=MAX_IDS)] = ()


PARAMETERS = tuple(field.name for field in fields(Sampling))
"""The names of all sampling parameters."""


@dataclass(frozen=True, slots=True)
class AdapterRef:
    """One version of one adapter. `digest` (sha256 hex over config and weights) is its identity; `name` is for people.

    `source` is a URI or local path of the content. Content at `source` is used only if it has the digest. The
    constructor raises InvalidRequest for a malformed digest, because digests name folders on disk.
    """

    name: str
    digest: str
    source: str

    def __post_init__(self) -> None:
        if not DIGEST.fullmatch(self.digest):
            raise InvalidRequest("an adapter's digest is 64 lowercase hexadecimal digits", param="digest")


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One prompt to continue `n` times, with the base model (`adapter` None) or with one adapter version.

    `deadline` is in `time.time()` seconds; None means no limit. Waiting requests go in order of arrival, but those with
    a lower `priority` count as older, and tenants share the workers. Requests with different values of `cache_salt`
    never use each other's entries of prefix caches.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: Sampling
    adapter: AdapterRef | None = None
    n: int = 1
    deadline: float | None = None
    priority: int = 0
    tenant: str = ""
    cache_salt: str = ""


@light_dataclass
class TokenLogprob:
    """Log probability of one sampled token, its rank (1 = most likely) and the most likely tokens, best first."""

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """Log probabilities of a prompt's tokens, from the second token on: row i is about prompt token i + 1.

    A row has `1 + top` values: those of the token itself, then of the `top` most likely tokens, best first. `ranks` has
    one value per row, the token's own rank. Arrays, because a long prompt has a million values.
    """

    top: int
    token_ids: array[int]
    logprobs: array[float]
    ranks: array[int]

    def __len__(self) -> int:
        return len(self.ranks)

    def __iter__(self) -> Iterator[TokenLogprob]:
        """The rows, each made when it is needed."""
        width = self.top + 1
        for row, rank in enumerate(self.ranks):
            start, end = row * width, (row + 1) * width
            top = tuple(zip(self.token_ids[start + 1 : end], self.logprobs[start + 1 : end], strict=True))
            yield TokenLogprob(self.token_ids[start], self.logprobs[start], rank, top)


@light_dataclass
class TokenDelta:
    """New tokens of one choice. `logprobs` has one entry per token, or none if the request doesn't ask for them.

    `finish_reason` is set on the last delta of a choice, whose tokens may be empty. `stop_token_id` is the caller's
    stop token that ended the choice, never an EOS. `cached_tokens` counts the prompt tokens found in a prefix cache;
    the first delta of choice 0 has it, and `prompt_logprobs` if the request asks for them.
    """

    index: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    cached_tokens: int = 0
    prompt_logprobs: PromptLogprobs | None = None

    def by_token(self) -> Iterator[TokenDelta]:
        """The same as deltas of one token each."""
        last = len(self.token_ids) - 1
        if last < 1:
            yield self
            return
        for number, token in enumerate(self.token_ids):
            logprobs = self.logprobs[number : number + 1]
            if number == last:
                yield TokenDelta(self.index, (token,), logprobs, self.finish_reason, self.stop_token_id)
            else:
                cached = 0 if number else self.cached_tokens
                yield TokenDelta(self.index, (token,), logprobs, cached_tokens=cached)


@dataclass(frozen=True, slots=True)
class KvHeader:
    """Identifies a prompt's KV bytes. The receiver checks all fields before a byte is used.

    `handle` is unique per attempt; `fingerprint` names model, dtype, KV layout, block size and attention backend;
    `adapter_digest` is "" for the base model; `checksum` is xxh3-64 over all `num_bytes` bytes; `uses` Decode calls
    may claim the handle; `prompt_hash` is sha256 over the `num_tokens` prompt tokens.
    """

    handle: str
    fingerprint: str
    adapter_digest: str
    num_tokens: int
    num_bytes: int
    checksum: int
    uses: int
    prompt_hash: bytes
