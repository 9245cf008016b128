"""A decode worker's service: continues choices from KV that arrived under handles, whole and verified, or fails them.

Owns the link between a claimed handle and the engine request that uses it.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

import grpc.aio

from preft.core.errors import EngineFailed, InvalidRequest, NumbersNotFinite, TransferFailed
from preft.core.request import TokenDelta
from preft.decode.choices import ChoiceService, choice_sampling
from preft.engine.port import Engine, EngineRequest, KvRegion
from preft.rpc import workers_pb2
from preft.rpc.checked import handle_of
from preft.rpc.status import errors_reported
from preft.transfer.handles import Claim, HandleTable
from preft.transfer.port import hash_prompt


class DecodeService(ChoiceService):
    """One decode worker's gRPC face."""

    def __init__(self, engine: Engine, handles: HandleTable) -> None:
        super().__init__()
        self._engine = engine
        self._handles = handles

    async def Release(
        self, request: workers_pb2.ReleaseRequest, context: grpc.aio.ServicerContext
    ) -> workers_pb2.ReleaseReply:
        async with errors_reported(context):
            self._handles.release(handle_of(request.handle))
        return workers_pb2.ReleaseReply()

    async def generate(self, request: workers_pb2.DecodeRequest) -> AsyncGenerator[TokenDelta, None]:
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
        except NumbersNotFinite:
            raise
        except EngineFailed as error:
            raise TransferFailed(f"the prompt's KV cache is no longer there: {error}") from error
        finally:
            claim.close()

    def _engine_request(
        self, request: workers_pb2.DecodeRequest, prompt: tuple[int, ...], claim: Claim
    ) -> EngineRequest:
        return EngineRequest(
            request_id=f"{request.request_id}-{request.index}-{request.handle}",
            prompt_token_ids=prompt,
            sampling=choice_sampling(request),
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
