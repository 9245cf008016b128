"""One request's data on its way through the cluster: sampling parameters, the request, and the resulting tokens.

All text is token ids here; only the gateway has text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType

from preft.core.errors import InvalidRequest

DIGEST = re.compile(r"[0-9a-f]{64}")
MAX_CHOICES = 1024  # of one request
NO_BIAS: Mapping[int, float] = MappingProxyType({})


class FinishReason(StrEnum):
    """Why a choice ended, in OpenAI's terms."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True)
class Sampling:
    """Sampling parameters with vLLM's meaning, for every choice of a request.

    `temperature` 0 is greedy; `top_k` 0 means all tokens; `logprobs` None means none, k means the sampled token and
    the k most likely. `stop_token_ids` are the caller's; `eos_token_ids` are the model's and are ignored under
    `ignore_eos`. `max_tokens` and `min_tokens` count output tokens, the first one included. Choice i of a seeded
    request uses `seed + i`.
    """

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    ignore_eos: bool = False
    eos_token_ids: tuple[int, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    logit_bias: Mapping[int, float] = field(default_factory=lambda: NO_BIAS)
    logprobs: int | None = None


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
    a lower `priority` count as older, and tenants share the workers.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: Sampling
    adapter: AdapterRef | None = None
    n: int = 1
    deadline: float | None = None
    priority: int = 0
    tenant: str = ""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log probability of one sampled token, its rank (1 = most likely) and the most likely tokens, best first."""

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class TokenDelta:
    """New tokens of one choice. `logprobs` has one entry per token, or none if the request doesn't ask for them.

    `finish_reason` is set on the last delta of a choice, whose tokens may be empty. `stop_token_id` is the caller's
    stop token that ended the choice, never an EOS. `cached_tokens` counts the prompt tokens found in a prefix cache;
    the first delta of choice 0 has it.
    """

    index: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    cached_tokens: int = 0
