"""A colocated worker's service: each choice from prompt to end in one engine, the adapter on the prompt alone."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing, nullcontext

import grpc.aio

from preft.adapters.store import AdapterStore
from preft.core.errors import InvalidRequest
from preft.core.request import TokenDelta
from preft.decode.choices import ChoiceService, choice_sampling
from preft.engine.port import Engine, EngineRequest
from preft.rpc import workers_pb2
from preft.rpc.convert import adapter_from_proto


class ColocatedService(ChoiceService):
    """One colocated worker's gRPC face."""

    def __init__(self, engine: Engine, adapters: AdapterStore) -> None:
        super().__init__()
        self._engine = engine
        self._adapters = adapters

    async def generate(self, request: workers_pb2.DecodeRequest) -> AsyncGenerator[TokenDelta, None]:
        adapter = adapter_from_proto(request.adapter) if request.HasField("adapter") else None
        if request.adapter_digest != (adapter.digest if adapter else ""):
            raise InvalidRequest("the request names one adapter and brings another", param="adapter")
        choice = EngineRequest(
            request_id=f"{request.request_id}-{request.index}-{request.handle}",
            prompt_token_ids=tuple(request.prompt_token_ids),
            sampling=choice_sampling(request),
            index=request.index,
            adapter=adapter,
            output_token_ids=tuple(request.output_token_ids),
        )
        async with (
            self._adapters.using(adapter) if adapter else nullcontext(),
            aclosing(self._engine.generate(choice)) as deltas,
        ):
            async for delta in deltas:
                yield delta

    async def Release(
        self, request: workers_pb2.ReleaseRequest, context: grpc.aio.ServicerContext
    ) -> workers_pb2.ReleaseReply:
        return workers_pb2.ReleaseReply()  # there are no handles here
