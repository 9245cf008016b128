"""The `DecodeWorker` service: continues choices from KV that arrived under handles, whole and verified, or fails them.

Owns the link between a claimed handle and the engine request that uses it. Many choices share a call: see `session`.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing

import grpc.aio

from preft.core.errors import EngineFailed, InvalidRequest, PreftError, TransferFailed
from preft.core.request import TokenDelta
from preft.decode.session import DecodeSession, Put
from preft.engine.port import Engine, EngineRequest, KvRegion
from preft.rpc import workers_pb2, workers_pb2_grpc
from preft.rpc.convert import sampling_from_proto
from preft.rpc.status import abort
from preft.transfer.handles import Claim, HandleTable
from preft.transfer.port import hash_prompt

logger = logging.getLogger(__name__)


class DecodeService(workers_pb2_grpc.DecodeWorkerServicer):
    """One decode worker's gRPC face."""

    def __init__(self, engine: Engine, handles: HandleTable) -> None:
        self._engine = engine
        self._handles = handles
        self.running = 0

    async def Decode(
        self, commands: AsyncIterator[workers_pb2.DecodeCommand], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[workers_pb2.DecodeEvents]:
        session = DecodeSession(self._serve)
        try:
            async with aclosing(session.run(commands)) as batches:
                async for batch in batches:
                    yield batch
        except PreftError as error:
            await abort(context, error)

    async def Release(
        self, request: workers_pb2.ReleaseRequest, context: grpc.aio.ServicerContext
    ) -> workers_pb2.ReleaseReply:
        self._handles.release(request.handle)
        return workers_pb2.ReleaseReply()

    async def _serve(self, request: workers_pb2.DecodeRequest, put: Put) -> None:
        """Gives `put` everything there is to say of one choice: its deltas, the last one finished, or an error."""
        self.running += 1
        try:
            async with aclosing(self._decode(request)) as deltas:
                async for delta in deltas:
                    put(delta)
                    if delta.finish_reason is not None:
                        return
            put(EngineFailed("the engine ended the request without a reason"))
        except PreftError as error:
            put(error)
        except Exception:
            logger.exception("request %s broke", request.request_id)
            put(EngineFailed("an internal error ended the request"))
        finally:
            self.running -= 1

    async def _decode(self, request: workers_pb2.DecodeRequest) -> AsyncGenerator[TokenDelta, None]:
        prompt = tuple(request.prompt_token_ids)
        if not prompt or not request.output_token_ids:
            raise InvalidRequest(
                "a decode request has a prompt and at least one output token", param="output_token_ids"
            )
        claim = await self._handles.claim(
            request.handle,
            adapter_digest=request.adapter_digest,
            prompt_hash=hash_prompt(prompt),
            num_tokens=len(prompt),
            timeout=request.kv_timeout,
        )
        try:
            async with aclosing(self._engine.generate(self._engine_request(request, prompt, claim))) as deltas:
                async for delta in deltas:
                    claim.loaded()
                    yield delta
        except EngineFailed as error:
            raise TransferFailed(f"the prompt's KV cache is no longer there: {error}") from error
        finally:
            claim.close()

    def _engine_request(
        self, request: workers_pb2.DecodeRequest, prompt: tuple[int, ...], claim: Claim
    ) -> EngineRequest:
        sampling = sampling_from_proto(request.sampling)
        if sampling.seed is not None:
            sampling = dataclasses.replace(sampling, seed=sampling.seed + request.index)
        return EngineRequest(
            request_id=f"{request.request_id}-{request.index}-{request.handle}",
            prompt_token_ids=prompt,
            sampling=sampling,
            index=request.index,
            output_token_ids=tuple(request.output_token_ids),
            load=KvRegion(claim.region.offset, claim.region.size, claim.region.nonce),
            salt=_salt(request.adapter_digest, len(prompt)),
        )


def _salt(adapter_digest: str, prompt_length: int) -> str:
    """What a prefix-cache entry depends on beside its tokens.

    Up to the prompt's end KV was made under the adapter, after it by the base model: only requests with the same
    adapter and the same prompt length agree on every position. For the base model there is no such border.
    """
    return f"{adapter_digest}:{prompt_length}" if adapter_digest else ""
