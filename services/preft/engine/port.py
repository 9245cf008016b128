"""What a worker asks of an engine, in token ids. `VllmEngine` is the real one; tests have a fake peer."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Protocol

from preft.core.errors import InvalidRequest
from preft.core.request import AdapterRef, Sampling, TokenDelta
from preft.transfer.staging import Region


@dataclass(frozen=True, slots=True)
class KvRegion:
    """Where one prompt's KV lies in the staging arena: `size` payload bytes at `offset`, while `nonce` stands there."""

    offset: int
    size: int
    nonce: bytes


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One choice to be generated.

    On prefill: `adapter` may be set, and `save` tells where the prompt's KV goes. On decode: `load` tells where the
    prompt's KV lies, and `output_token_ids` (at least one) are the tokens made so far; generation goes on after them.
    Colocated: `adapter` acts on the prompt, and there may be `output_token_ids`. `salt` separates prefix-cache entries
    that equal tokens alone must not share. A seed in `sampling` is this choice's own.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: Sampling
    index: int = 0
    adapter: AdapterRef | None = None
    save: KvRegion | None = None
    output_token_ids: tuple[int, ...] = ()
    load: KvRegion | None = None
    salt: str = ""


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What is known once an engine runs. Engines with equal `kv_layout` can exchange KV blocks ("": it can't)."""

    kv_layout: str
    block_size: int
    block_bytes: int  # one block over all layers; 0 if none is transferred
    kv_blocks: int  # usable ones
    max_model_len: int
    vocab_size: int
    pids: tuple[int, ...]


def check_request(request: EngineRequest, info: EngineInfo) -> None:
    """Raises InvalidRequest for ids, a length or a seed that would end an engine's process, or that it can't take."""
    prompt, output, sampling = request.prompt_token_ids, request.output_token_ids, request.sampling
    if not prompt or len(prompt) + len(output) >= info.max_model_len:
        raise InvalidRequest("the engine refuses the request: it can't continue so many tokens", param="prompt")
    named = (prompt, output, sampling.stop_token_ids, sampling.logit_bias)
    if max(max(ids, default=0) for ids in named) >= info.vocab_size:
        raise InvalidRequest("the engine refuses the request: a token id is not in the vocabulary", param="prompt")
    if sampling.seed is not None and not -(2**63) <= sampling.seed < 2**63:
        raise InvalidRequest("the engine refuses the request: a seed is out of range", param="seed")


@dataclass(slots=True)
class EngineStats:
    """Kept up to date by the engine after each step."""

    kv_usage: float = 0.0
    running: int = 0
    waiting: int = 0
    preemptions: int = 0
    prompt_tokens_computed: int = 0


class Engine(Protocol):
    """One running engine."""

    info: EngineInfo
    stats: EngineStats

    def generate(self, request: EngineRequest) -> AsyncGenerator[TokenDelta, None]:
        """Deltas of one choice, the last one with its finish reason. Closing the generator aborts the request.

        Raises InvalidRequest for what no engine can do, EngineFailed if the engine gave the request up (on decode: its
        KV couldn't be loaded), WorkerLost if the engine is dead.
        """

    async def place_adapter(self, adapter: AdapterRef, region: Region) -> None:
        """Says where in the adapters' arena this content lies now. Raises InvalidAdapter if it can't be served.

        It stays there while requests that name it run: the engine takes it into a slot when a step needs it.
        """

    def forget_adapter(self, digest: str) -> None:
        """The content isn't in the arena any more. Nothing names it until it is placed again."""

    async def aborted(self) -> None:
        """Returns once no request whose generator was closed before can be in a step any more."""

    async def wait_dead(self) -> str:
        """Returns, with the reason, when the engine has died."""

    async def close(self) -> None:
        """Ends the engine's processes."""
