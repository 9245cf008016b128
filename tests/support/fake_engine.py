"""A peer of VllmEngine without a model: KV bytes and tokens are hashes, so that lost or swapped ones show at once.

A prompt's KV depends on adapter digest and tokens. Every output token depends on the KV bytes that the engine really
has. Tests script failures and pace through `failing`, `die`, `preempt`, `going`, `one_by_one` and `answering`.
"""

from __future__ import annotations

import asyncio
import hashlib
import struct
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing

from preft.adapters.formats.digest import add_file_header
from preft.adapters.store.packed import unpack
from preft.core.cluster import Role
from preft.core.errors import EngineFailed, InvalidAdapter, PreftError, WorkerLost
from preft.core.request import AdapterRef, FinishReason, PromptLogprobs, Sampling, TokenDelta, TokenLogprob
from preft.engine.port import EngineInfo, EngineRequest, EngineStats, check_request
from preft.memory.arena import Region, StagingView
from preft.memory.errors import StaleRegion
from preft.transfer.seal import SEAL, read_seal, write_seal
from support.prompt_logprobs import made_up

BLOCK_SIZE = 4
BLOCK_BYTES = 96
VOCABULARY = 1000
_TAG = 32  # bytes at the start of each block that determine the rest of it


def kv_of(digest: str, prompt: Sequence[int]) -> bytes:
    """The KV of a prompt: BLOCK_BYTES per begun block. A block depends on the adapter and all tokens up to its end."""
    blocks = []
    for start in range(0, len(prompt), BLOCK_SIZE):
        tokens = prompt[: start + BLOCK_SIZE]
        tag = hashlib.sha256(digest.encode() + struct.pack(f"<{len(tokens)}I", *tokens)).digest()
        blocks.append(_block(tag))
    return b"".join(blocks)


def tokens_of(
    digest: str, prompt: Sequence[int], sampling: Sampling, *, index: int = 0, output: Sequence[int] = ()
) -> list[int]:
    """An engine's tokens after `output`, until the request ends. `sampling.seed` is this choice's own."""
    return _generated(kv_of(digest, prompt), prompt, sampling, index, output)


def _block(tag: bytes) -> bytes:
    return tag + hashlib.shake_256(tag).digest(BLOCK_BYTES - _TAG)


def _generated(kv: bytes, prompt: Sequence[int], sampling: Sampling, index: int, output: Sequence[int]) -> list[int]:
    tokens = list(output)
    while True:
        tokens.append(_next_token(kv, prompt, sampling, index, tokens))
        if _ending(sampling, tokens) is not None:
            return tokens[len(output) :]


def _next_token(kv: bytes, prompt: Sequence[int], sampling: Sampling, index: int, output: Sequence[int]) -> int:
    chance = ""
    if sampling.temperature > 0:
        chance = f"index {index}" if sampling.seed is None else f"seed {sampling.seed}"
    for token, bias in sampling.logit_bias.items():
        if bias >= 100 and _allowed(sampling, token, output):
            return token
    state = hashlib.sha256(kv + repr((tuple(prompt), tuple(output), chance)).encode()).digest()
    while True:
        token = int.from_bytes(state[:8], "little") % VOCABULARY
        if _allowed(sampling, token, output):
            return token
        state = hashlib.sha256(state).digest()


def _allowed(sampling: Sampling, token: int, output: Sequence[int]) -> bool:
    return len(output) >= sampling.min_tokens or token not in _stops(sampling)


def _stops(sampling: Sampling) -> tuple[int, ...]:
    return sampling.stop_token_ids if sampling.ignore_eos else (*sampling.stop_token_ids, *sampling.eos_token_ids)


def _ending(sampling: Sampling, output: Sequence[int]) -> FinishReason | None:
    if len(output) >= sampling.min_tokens and output[-1] in _stops(sampling):
        return FinishReason.STOP
    return FinishReason.LENGTH if len(output) >= sampling.max_tokens else None


class FakeEngine:
    """An `Engine`. Tests may read or set everything below `stats`."""

    def __init__(
        self, role: Role, arena: str, adapter_arena: str = "", *, kv_blocks: int = 64, max_model_len: int = 128
    ) -> None:
        self.info = EngineInfo("fake", BLOCK_SIZE, BLOCK_BYTES, kv_blocks, max_model_len, VOCABULARY, (1,))
        self.stats = EngineStats()
        self.prompt_tokens_computed = 0
        self.going = asyncio.Event()  # tokens come only while it is set
        self.going.set()
        self.one_by_one: asyncio.Semaphore | None = None  # if set, each token acquires it once
        self.answering = asyncio.Event()  # the engine's process hangs while it is cleared
        self.answering.set()
        self.failing: Callable[[EngineRequest, int], PreftError | None] = lambda request, made: None
        self.requests: list[EngineRequest] = []
        self.aborts = 0  # generators closed before their end
        self.loaded: list[str] = []  # digests, in order of `place_adapter` calls
        self.refused: set[str] = set()  # digests
        self.closed = False
        self._role = role
        self._view = StagingView(arena)
        self._adapters = StagingView(adapter_arena) if adapter_arena else None
        self._regions: dict[str, Region] = {}
        self._dead: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._preemptions = 0
        self._used = 0
        self._prefixes: set[tuple[str, str, tuple[int, ...]]] = set()  # salt, digest, tokens up to a block's end

    def die(self, reason: str) -> None:
        """Simulates the death of the engine's process: every request fails, now and later."""
        self._dead.set_result(reason)
        self.going.set()
        self.answering.set()

    def preempt(self) -> None:
        """Takes the KV of every running request; each request loads it from its region again before it goes on."""
        self._preemptions += 1

    async def generate(self, request: EngineRequest) -> AsyncGenerator[TokenDelta, None]:
        self._check(request)
        self.requests.append(request)
        blocks = -(-len(request.prompt_token_ids) // BLOCK_SIZE)
        self._account(1, blocks)
        finished = False
        try:
            async with aclosing(self._tokens(request)) as deltas:
                async for delta in deltas:
                    finished = delta.finish_reason is not None
                    yield delta
        except (GeneratorExit, asyncio.CancelledError):
            self.aborts += not finished
            raise
        finally:
            self._account(-1, -blocks)

    async def place_adapter(self, adapter: AdapterRef, region: Region) -> None:
        await self._step()
        if adapter.digest in self.refused:
            raise InvalidAdapter(f"adapter {adapter.name!r} was refused by the engine")
        self._regions[adapter.digest] = region
        self._find_adapter(adapter.digest)
        self.loaded.append(adapter.digest)

    def forget_adapter(self, digest: str) -> None:
        self._regions.pop(digest, None)

    async def between_steps(self) -> None:
        await self._step()

    async def _step(self) -> None:
        await self.answering.wait()
        if self._dead.done():
            raise WorkerLost(f"the engine died: {self._dead.result()}")
        await asyncio.sleep(0)

    def kill(self, reason: str) -> None:
        self.die(reason)

    def _find_adapter(self, digest: str) -> None:
        """Fails the test unless the adapter's region holds its content."""
        assert self._adapters is not None
        region, found = self._regions[digest], hashlib.sha256()
        with self._adapters.hold(region) as memory:
            for name, content in unpack(memory).items():
                add_file_header(found, name, len(content))
                found.update(content)
        assert found.hexdigest() == digest

    async def wait_dead(self) -> str:
        return await asyncio.shield(self._dead)

    async def close(self) -> None:
        self.closed = True
        self._view.close()
        if self._adapters is not None:
            self._adapters.close()

    def _check(self, request: EngineRequest) -> None:
        check_request(request, self.info)
        if (self._role is Role.DECODE) != bool(request.load and request.output_token_ids):
            raise AssertionError("a decode request has KV and tokens, a prefill request has neither")

    async def _tokens(self, request: EngineRequest) -> AsyncGenerator[TokenDelta, None]:
        sampling = request.sampling
        output = list(request.output_token_ids)
        kv, preemptions = b"", -1
        cached = self._cached_tokens(request)
        prompt_logprobs = self._prompt_logprobs(request)
        while True:
            await self.going.wait()
            await self.answering.wait()
            await (self.one_by_one.acquire() if self.one_by_one else asyncio.sleep(0))
            if self._dead.done():
                raise WorkerLost(f"the engine died: {self._dead.result()}")
            if (error := self.failing(request, len(output) - len(request.output_token_ids))) is not None:
                raise error
            if preemptions != self._preemptions:
                preemptions = self._preemptions
                kv = self._prompt_kv(request)
            output.append(_next_token(kv, request.prompt_token_ids, sampling, request.index, output))
            ending = _ending(sampling, output)
            if self._role is Role.PREFILL:
                ending = ending or FinishReason.LENGTH
            yield _delta(request, output[-1], ending, cached, prompt_logprobs)
            cached, prompt_logprobs = 0, None
            if ending is not None:
                return

    def _cached_tokens(self, request: EngineRequest) -> int:
        """Tokens that vLLM would report as found in its prefix cache: of whole blocks, the last token never."""
        if request.load is not None or request.index or request.output_token_ids:
            return 0
        if request.sampling.prompt_logprobs is not None:
            return 0  # computed anew
        digest, prompt = request.adapter.digest if request.adapter else "", request.prompt_token_ids
        ends = range(BLOCK_SIZE, len(prompt), BLOCK_SIZE)
        keys = [(request.salt, digest, prompt[:end]) for end in ends]
        found = next((number for number, key in enumerate(keys) if key not in self._prefixes), len(keys))
        self._prefixes.update(keys)
        return found * BLOCK_SIZE

    def _prompt_logprobs(self, request: EngineRequest) -> PromptLogprobs | None:
        top = request.sampling.prompt_logprobs
        if top is None or request.load is not None or request.index or request.output_token_ids:
            return None
        return made_up(request.prompt_token_ids, top, request.adapter.digest if request.adapter else "")

    def _prompt_kv(self, request: EngineRequest) -> bytes:
        """Prefill: computes the KV, and saves it if the request asks for it. Decode: reads the region, nothing else."""
        if request.load is not None:
            try:
                return self._load(request.load, len(request.prompt_token_ids))
            except StaleRegion as error:
                raise EngineFailed("the engine gave the request up") from error
        if request.adapter is not None:
            self._find_adapter(request.adapter.digest)
        kv = kv_of(request.adapter.digest if request.adapter else "", request.prompt_token_ids)
        self.prompt_tokens_computed += len(request.prompt_token_ids)
        if request.save is not None:
            try:
                with self._view.hold(request.save) as payload:
                    payload[: len(kv)] = kv
                    write_seal(payload, len(request.prompt_token_ids))
            except StaleRegion:
                pass  # given up meanwhile
        return kv

    def _load(self, region: Region, num_tokens: int) -> bytes:
        with self._view.hold(region) as payload:
            if read_seal(payload) != num_tokens:
                raise StaleRegion("the region doesn't hold that many tokens")
            kv = bytes(payload[: -SEAL.size])
        for start in range(0, len(kv), BLOCK_BYTES):
            block = kv[start : start + BLOCK_BYTES]
            if block != _block(block[:_TAG]):
                raise AssertionError("what was loaded is nobody's KV")
        return kv

    def _account(self, requests: int, blocks: int) -> None:
        self.stats.running += requests
        self._used += blocks
        self.stats.kv_usage = self._used / self.info.kv_blocks


def _delta(
    request: EngineRequest, token: int, ending: FinishReason | None, cached: int, prompt: PromptLogprobs | None
) -> TokenDelta:
    sampling = request.sampling
    logprobs: tuple[TokenLogprob, ...] = ()
    if sampling.logprobs is not None:
        others = [(token + 1 + rank) % VOCABULARY for rank in range(max(0, sampling.logprobs - 1))]
        top = [(other, -0.5 - rank) for rank, other in enumerate((token, *others))][: sampling.logprobs]
        logprobs = (TokenLogprob(token, -0.5, 1, tuple(top)),)
    by_caller = ending is FinishReason.STOP and token in sampling.stop_token_ids
    return TokenDelta(request.index, (token,), logprobs, ending, token if by_caller else None, cached, prompt)
