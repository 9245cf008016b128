"""The `DecodeWorker` service for any source of choices: takes Decode calls, and ends every choice with an answer.

The service counts each choice as a sequence of its caller. A subclass generates a choice; `session` handles a call's
many choices.
"""

from __future__ import annotations

import dataclasses
import logging
from abc import abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from functools import partial

import grpc.aio

from preft.core.errors import EngineFailed, PreftError
from preft.core.request import Sampling, TokenDelta
from preft.rpc import workers_pb2, workers_pb2_grpc
from preft.rpc.caller import caller_of
from preft.rpc.convert import check_decode
from preft.rpc.status import errors_reported
from preft.worker.decode.session import DecodeSession, Put, Serve
from preft.worker.usage import Usage

logger = logging.getLogger(__name__)


Deltas = AsyncGenerator[TokenDelta, None]
"""A choice's deltas; the last one has a finish reason. Raises a PreftError if the choice fails."""


class ChoiceService(workers_pb2_grpc.DecodeWorkerServicer):
    """Serves choices that a subclass generates."""

    def __init__(self, usage: Usage) -> None:
        self.usage = usage

    @abstractmethod
    def begin(self, request: workers_pb2.DecodeRequest, caller: str) -> Callable[[workers_pb2.DecodeChoice], Deltas]:
        """Prepares the shared part of the request's choices; the result starts one choice. Raises InvalidRequest."""

    async def Decode(
        self, commands: AsyncIterator[workers_pb2.DecodeCommand], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[workers_pb2.DecodeEvents]:
        async with errors_reported(context):
            session = DecodeSession(partial(self._begin, caller_of(context)))
            async with aclosing(session.run(commands)) as batches:
                async for batch in batches:
                    yield batch

    def _begin(self, caller: str, request: workers_pb2.DecodeRequest) -> Serve:
        check_decode(request)
        return partial(self._serve, caller, request.request_id, self.begin(request, caller))

    async def _serve(
        self,
        caller: str,
        request_id: str,
        generate: Callable[[workers_pb2.DecodeChoice], Deltas],
        choice: workers_pb2.DecodeChoice,
        put: Put,
    ) -> None:
        """Gives `put` all deltas of one choice, the last one with a finish reason, or an error."""
        with self.usage.sequence(caller):
            try:
                async with aclosing(generate(choice)) as deltas:
                    async for delta in deltas:
                        put(delta)
                        if delta.finish_reason is not None:
                            return
                put(EngineFailed("the engine ended the request without a reason"))
            except PreftError as error:
                put(error)
            except Exception:
                logger.exception("choice %d of request %s broke", choice.index, request_id)
                put(EngineFailed("an internal error ended the request"))


def choice_sampling(sampling: Sampling, index: int) -> Sampling:
    """The sampling of one choice of a request: each choice has its own seed."""
    if sampling.seed is None:
        return sampling
    return dataclasses.replace(sampling, seed=sampling.seed + index)
