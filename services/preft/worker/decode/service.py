"""A decode worker's service: continues choices from KV that arrived whole and verified under a handle, or fails them.

The service owns the link between a claimed handle and the engine request that uses it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from functools import partial

import grpc.aio

from preft.core.errors import EngineFailed, InvalidRequest, NumbersNotFinite, TransferFailed
from preft.engine.port import Engine, EngineRequest
from preft.rpc import workers_pb2
from preft.rpc.checked import handle_of
from preft.rpc.convert import sampling_from_proto
from preft.rpc.status import errors_reported
from preft.transfer.handles import Claim, HandleTable
from preft.transfer.port import hash_prompt
from preft.worker.decode.choices import ChoiceService, Deltas, choice_sampling
from preft.worker.usage import Usage


class DecodeService(ChoiceService):
    """The gRPC service of one decode worker."""

    def __init__(self, engine: Engine, handles: HandleTable, usage: Usage) -> None:
        super().__init__(usage)
        self._engine = engine
        self._handles = handles

    async def Release(
        self, request: workers_pb2.ReleaseRequest, context: grpc.aio.ServicerContext
    ) -> workers_pb2.ReleaseReply:
        async with errors_reported(context):
            self._handles.release(handle_of(request.handle))
        return workers_pb2.ReleaseReply()

    def begin(self, request: workers_pb2.DecodeRequest, caller: str) -> Callable[[workers_pb2.DecodeChoice], Deltas]:
        tokens = tuple(request.prompt_token_ids)
        if not tokens:
            raise InvalidRequest("a decode request has a prompt", param="prompt_token_ids")
        prompt = EngineRequest(
            request_id=f"{request.request_id}-{request.handle}",
            prompt_token_ids=tokens,
            sampling=sampling_from_proto(request.sampling),
            salt=_salt(request.cache_salt, request.adapter_digest, len(tokens)),
        )
        claim = partial(
            self._handles.claim,
            request.handle,
            adapter_digest=request.adapter_digest,
            prompt_hash=hash_prompt(tokens),
            num_tokens=len(tokens),
            timeout=request.kv_timeout,
        )
        return partial(self._generate, prompt, claim)

    async def _generate(
        self, prompt: EngineRequest, make_claim: Callable[[], Awaitable[Claim]], choice: workers_pb2.DecodeChoice
    ) -> Deltas:
        if not choice.output_token_ids:
            raise InvalidRequest("a decode request has at least one output token", param="output_token_ids")
        claim = await make_claim()
        request = dataclasses.replace(
            prompt,
            request_id=f"{prompt.request_id}-{choice.index}",
            sampling=choice_sampling(prompt.sampling, choice.index),
            index=choice.index,
            output_token_ids=tuple(choice.output_token_ids),
            load=claim.region,
        )
        try:
            async with aclosing(self._engine.generate(request)) as deltas:
                async for delta in deltas:
                    claim.loaded()
                    yield delta
        except NumbersNotFinite:
            raise
        except EngineFailed as error:
            if not claim.evicted:
                raise
            raise TransferFailed("the prompt's KV cache had to make room for others, and was needed again") from error
        finally:
            claim.close()


def _salt(own: str, adapter_digest: str, prompt_length: int) -> str:
    """The properties on which a prefix-cache entry depends beside its tokens.

    The adapter made the KV up to the prompt's end, and the base model the KV after it. So only requests with the same
    adapter and the same prompt length agree at every position. The base model has no such border. `own` is the
    request's own salt.
    """
    return ":".join(filter(None, [own, adapter_digest and f"{adapter_digest}:{prompt_length}"]))
