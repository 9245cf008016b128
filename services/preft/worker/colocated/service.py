"""A colocated worker's service: each choice from prompt to end in one engine, with the adapter on the prompt alone.

The engine's scheduler and model runner keep the adapter off the output.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import ExitStack, aclosing, nullcontext
from functools import partial

import grpc.aio

from preft.adapters.store.adapter_store import AdapterStore
from preft.core.errors import InvalidRequest
from preft.engine.port import Engine, EngineRequest
from preft.rpc import workers_pb2
from preft.rpc.convert import adapter_from_proto, sampling_from_proto
from preft.worker.decode.choices import ChoiceService, Deltas, choice_sampling
from preft.worker.usage import Usage


class ColocatedService(ChoiceService):
    """The gRPC service of one colocated worker."""

    def __init__(self, engine: Engine, adapters: AdapterStore, usage: Usage) -> None:
        super().__init__(usage)
        self._engine = engine
        self._adapters = adapters

    def begin(self, request: workers_pb2.DecodeRequest, caller: str) -> Callable[[workers_pb2.DecodeChoice], Deltas]:
        adapter = adapter_from_proto(request.adapter) if request.HasField("adapter") else None
        if request.adapter_digest != (adapter.digest if adapter else ""):
            raise InvalidRequest("the request names one adapter and brings another", param="adapter")
        prompt = EngineRequest(
            request_id=f"{request.request_id}-{request.handle}",
            prompt_token_ids=tuple(request.prompt_token_ids),
            sampling=sampling_from_proto(request.sampling),
            adapter=adapter,
            salt=request.cache_salt,
        )
        return partial(self._generate, caller, prompt)

    async def _generate(self, caller: str, prompt: EngineRequest, choice: workers_pb2.DecodeChoice) -> Deltas:
        """The choice takes an adapter slot until its first delta: then its prompt is computed. Raises WorkerFull."""
        request = dataclasses.replace(
            prompt,
            request_id=f"{prompt.request_id}-{choice.index}",
            sampling=choice_sampling(prompt.sampling, choice.index),
            index=choice.index,
            output_token_ids=tuple(choice.output_token_ids),
        )
        with ExitStack() as slot:
            digest, tokens = request.adapter.digest if request.adapter else "", len(request.prompt_token_ids)
            slot.enter_context(self.usage.prompt(caller, digest, tokens))
            async with (
                self._adapters.using(request.adapter) if request.adapter else nullcontext(),
                aclosing(self._engine.generate(request)) as deltas,
            ):
                async for delta in deltas:
                    slot.close()
                    yield delta

    async def Release(
        self, request: workers_pb2.ReleaseRequest, context: grpc.aio.ServicerContext
    ) -> workers_pb2.ReleaseReply:
        return workers_pb2.ReleaseReply()  # there are no handles here
