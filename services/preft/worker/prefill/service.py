"""The `PrefillWorker` service: adapted prompt pass, first tokens, then the push of the prompt's KV to a decode worker.

The service owns the order of these steps and the staging region between them. Its caller owns engine, arena and
transport.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import ExitStack, aclosing, nullcontext

import grpc.aio

from preft.adapters.store.adapter_store import AdapterStore
from preft.core.errors import EngineFailed, InvalidRequest, TransferFailed
from preft.core.request import AdapterRef, FinishReason, KvHeader, Sampling, TokenDelta
from preft.engine.port import Engine, EngineRequest
from preft.memory.arena import Region, StagingArena
from preft.memory.errors import NoRoom, TooLarge
from preft.rpc import workers_pb2, workers_pb2_grpc
from preft.rpc.caller import caller_of
from preft.rpc.convert import adapter_from_proto, check_prefill, delta_to_proto, sampling_from_proto
from preft.rpc.prompt_logprobs import prompt_parts
from preft.rpc.status import errors_reported
from preft.transfer.port import KvSender, checksum_of, hash_prompt
from preft.transfer.seal import SEAL, clear_seal, read_seal
from preft.worker.usage import Usage

GREEDY = Sampling(max_tokens=1, temperature=0.0)
"""The sampling of a resumed request's prompt pass, whose token is not used."""


class PrefillService(workers_pb2_grpc.PrefillWorkerServicer):
    """The gRPC service of one prefill worker."""

    def __init__(
        self,
        engine: Engine,
        adapters: AdapterStore,
        arena: StagingArena,
        sender: KvSender,
        fingerprint: str,
        usage: Usage,
    ) -> None:
        self._engine = engine
        self._adapters = adapters
        self._arena = arena
        self._sender = sender
        self._fingerprint = fingerprint
        self.usage = usage

    async def Prefill(
        self, request: workers_pb2.PrefillRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[workers_pb2.PrefillEvent]:
        async with (
            errors_reported(context),
            aclosing(self._prefill(request, caller_of(context), context.time_remaining())) as events,
        ):
            async for event in events:
                yield event

    async def _prefill(
        self, request: workers_pb2.PrefillRequest, caller: str, time_remaining: float | None
    ) -> AsyncGenerator[workers_pb2.PrefillEvent, None]:
        check_prefill(request)
        sampling = GREEDY if request.resume else sampling_from_proto(request.sampling)
        adapter = adapter_from_proto(request.adapter) if request.HasField("adapter") else None
        prompt = tuple(request.prompt_token_ids)
        timeout = 60.0 if time_remaining is None else time_remaining
        with self.usage.prefill(caller), ExitStack() as slot, ExitStack() as staging:
            slot.enter_context(self.usage.prompt(caller, adapter.digest if adapter else "", len(prompt)))
            region = None
            if request.HasField("target"):
                if adapter is not None:
                    await self._adapters.prefetch(adapter)  # before the region is reserved: a load may take long
                region = await self._room(self._kv_bytes(len(prompt)), timeout)
                staging.callback(self._arena.release, region)
                clear_seal(self._arena.view(region))
            async with self._adapters.using(adapter) if adapter else nullcontext():
                choices = await self._first_tokens(request, prompt, sampling, adapter, region)
            slot.close()  # the router counts the slot as free once it has the first tokens
            for part in prompt_parts(choices[0].prompt_logprobs) if choices[0].prompt_logprobs is not None else ():
                yield workers_pb2.PrefillEvent(prompt_logprobs=part)
            yield _first_tokens_event(choices)
            uses = request.n if request.resume else sum(choice.finish_reason is None for choice in choices)
            if region is not None and uses:
                yield await self._push(request, prompt, adapter, region, uses, timeout)

    async def _room(self, size: int, timeout: float) -> Region:
        try:
            return await self._arena.reserve(size, timeout=timeout)
        except TooLarge as error:
            raise InvalidRequest(f"the prompt's KV doesn't fit into the staging memory: {error}") from error
        except NoRoom as error:
            raise TransferFailed(f"no room for the prompt's KV in the staging memory: {error}") from error

    def _kv_bytes(self, num_tokens: int) -> int:
        blocks = -(-num_tokens // self._engine.info.block_size)
        return blocks * self._engine.info.block_bytes + SEAL.size

    async def _first_tokens(
        self,
        request: workers_pb2.PrefillRequest,
        prompt: tuple[int, ...],
        sampling: Sampling,
        adapter: AdapterRef | None,
        region: Region | None,
    ) -> list[TokenDelta]:
        """Each choice's first token. The first pass saves the KV to `region`; other passes reuse its prefix cache."""
        attempt = request.target.handle or "last"

        def choice(index: int) -> EngineRequest:
            seed = None if sampling.seed is None else sampling.seed + index
            return EngineRequest(
                request_id=f"{request.request_id}-{index}-{attempt}",
                prompt_token_ids=prompt,
                sampling=dataclasses.replace(sampling, seed=seed),
                index=index,
                adapter=adapter,
                save=region if index == 0 else None,
                salt=request.cache_salt,
            )

        first = await self._one_token(choice(0))
        if request.resume:
            return [first]
        try:
            async with asyncio.TaskGroup() as group:
                others = [group.create_task(self._one_token(choice(index))) for index in range(1, request.n)]
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None
        deltas = [first, *(task.result() for task in others)]
        if sampling.max_tokens > 1:  # the engine's limit was one token: its "length" isn't the request's
            deltas = [
                dataclasses.replace(delta, finish_reason=None) if delta.finish_reason is FinishReason.LENGTH else delta
                for delta in deltas
            ]
        return deltas

    async def _one_token(self, request: EngineRequest) -> TokenDelta:
        last: TokenDelta | None = None
        async with aclosing(self._engine.generate(request)) as deltas:
            async for delta in deltas:
                last = delta
        if last is None or len(last.token_ids) != 1 or last.finish_reason is None:
            raise EngineFailed("the engine ended the prompt pass without a token")
        return last

    async def _push(
        self,
        request: workers_pb2.PrefillRequest,
        prompt: tuple[int, ...],
        adapter: AdapterRef | None,
        region: Region,
        uses: int,
        timeout: float,
    ) -> workers_pb2.PrefillEvent:
        payload = self._arena.view(region)
        if read_seal(payload) != len(prompt):
            raise TransferFailed("the engine didn't write the prompt's KV cache")
        header = KvHeader(
            handle=request.target.handle,
            fingerprint=self._fingerprint,
            adapter_digest=adapter.digest if adapter is not None else "",
            num_tokens=len(prompt),
            num_bytes=region.size,
            checksum=checksum_of(payload),
            uses=uses,
            prompt_hash=hash_prompt(prompt),
        )
        await self._sender.push(request.target.address, header, payload, timeout=timeout)
        return workers_pb2.PrefillEvent(kv_pushed=workers_pb2.KvPushed())


def _first_tokens_event(choices: list[TokenDelta]) -> workers_pb2.PrefillEvent:
    return workers_pb2.PrefillEvent(
        first_tokens=workers_pb2.FirstTokens(choices=[delta_to_proto(choice) for choice in choices])
    )
