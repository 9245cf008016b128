"""The interface of an engine, in token ids, and the check of a request. `VllmEngine` implements the interface."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Protocol

from preft.core.errors import InvalidRequest
from preft.core.request import AdapterRef, Sampling, TokenDelta
from preft.memory.arena import Region


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One choice to generate.

    Prefill: `adapter` may be set, and `save` is the region for the prompt's KV. Decode: `load` is the region with the
    prompt's KV, and `output_token_ids` (at least one) are the tokens so far, after which generation continues.
    Colocated: `adapter` acts on the prompt, and `output_token_ids` may be empty. `salt` separates prefix-cache entries
    that requests with equal tokens must not share. A seed in `sampling` is this choice's own.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: Sampling
    index: int = 0
    adapter: AdapterRef | None = None
    save: Region | None = None
    output_token_ids: tuple[int, ...] = ()
    load: Region | None = None
    salt: str = ""


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """Properties of a running engine. Engines with equal `kv_layout` can exchange KV blocks; "" means no exchange."""

    kv_layout: str
    block_size: int
    block_bytes: int  # one block over all layers; 0 if the engine transfers no KV
    kv_blocks: int  # usable blocks
    max_model_len: int
    vocab_size: int
    pids: tuple[int, ...]


def check_request(request: EngineRequest, info: EngineInfo) -> None:
    """Raises InvalidRequest for ids, lengths or seeds that the engine can't take or that would end its process."""
    prompt, output, sampling = request.prompt_token_ids, request.output_token_ids, request.sampling
    if not prompt or len(prompt) + len(output) >= info.max_model_len:
        raise InvalidRequest("the engine refuses the request: it can't continue so many tokens", param="prompt")
    named = (prompt, output, sampling.stop_token_ids, sampling.logit_bias, sampling.allowed_token_ids)
    if max(max(ids, default=0) for ids in named) >= info.vocab_size:
        raise InvalidRequest("the engine refuses the request: a token id is not in the vocabulary", param="prompt")
    if sampling.seed is not None and not -(2**63) <= sampling.seed < 2**63:
        raise InvalidRequest("the engine refuses the request: a seed is out of range", param="seed")


@dataclass(slots=True)
class EngineStats:
    """Figures that the engine updates after each step."""

    kv_usage: float = 0.0
    running: int = 0
    waiting: int = 0
    preemptions: int = 0


class Engine(Protocol):
    """One running engine."""

    info: EngineInfo
    stats: EngineStats

    def generate(self, request: EngineRequest) -> AsyncGenerator[TokenDelta, None]:
        """Yields the deltas of one choice; the last one has a finish reason. Closing the generator aborts the request.

        Raises InvalidRequest for impossible requests, EngineFailed if the engine gave the request up (on decode: its
        KV couldn't be loaded), and WorkerLost if the engine is dead.
        """

    async def place_adapter(self, adapter: AdapterRef, region: Region) -> None:
        """Tells the engine that the adapter lies in `region` of the adapters' arena. Raises InvalidAdapter.

        The region stays while requests with this adapter run: the engine fills a slot from it when a step needs it.
        """

    def forget_adapter(self, digest: str) -> None:
        """Tells the engine that the content left the arena. No request uses it until the next `place_adapter`."""

    async def between_steps(self) -> None:
        """Returns once the engine has answered between two steps, or while it is idle.

        No later step contains a request whose generator was closed before this call. Raises WorkerLost if the engine is
        dead; may wait for ever if it dies now.
        """

    def kill(self, reason: str) -> None:
        """Ends the engine's processes at once, whatever they do. `wait_dead` returns `reason` then."""

    async def wait_dead(self) -> str:
        """Waits until the engine has died or was killed, and returns the reason."""

    async def close(self) -> None:
        """Ends the engine's processes."""
