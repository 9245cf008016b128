"""The `DecodeWorker` service without the question where a choice comes from: calls in, and an end for every choice.

Owns the count of running choices. Many choices share a call: see `session`.
"""

from __future__ import annotations

import dataclasses
import logging
from abc import abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing

import grpc.aio

from preft.core.errors import EngineFailed, PreftError
from preft.core.request import Sampling, TokenDelta
from preft.decode.session import DecodeSession, Put
from preft.rpc import workers_pb2, workers_pb2_grpc
from preft.rpc.convert import check_decode, sampling_from_proto
from preft.rpc.status import errors_reported

logger = logging.getLogger(__name__)


class ChoiceService(workers_pb2_grpc.DecodeWorkerServicer):
    """Serves each choice with `generate`, which a subclass has."""

    def __init__(self) -> None:
        self.running = 0

    @abstractmethod
    def generate(self, request: workers_pb2.DecodeRequest) -> AsyncGenerator[TokenDelta, None]:
        """The choice's deltas, the last one with its finish reason. Raises a PreftError if it can't be done."""

    async def Decode(
        self, commands: AsyncIterator[workers_pb2.DecodeCommand], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[workers_pb2.DecodeEvents]:
        session = DecodeSession(self._serve)
        async with errors_reported(context), aclosing(session.run(commands)) as batches:
            async for batch in batches:
                yield batch

    async def _serve(self, request: workers_pb2.DecodeRequest, put: Put) -> None:
        """Gives `put` everything there is to say of one choice: its deltas, the last one finished, or an error."""
        self.running += 1
        try:
            check_decode(request)
            async with aclosing(self.generate(request)) as deltas:
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


def choice_sampling(request: workers_pb2.DecodeRequest) -> Sampling:
    """How this one choice is sampled: its seed is its own."""
    sampling = sampling_from_proto(request.sampling)
    if sampling.seed is None:
        return sampling
    return dataclasses.replace(sampling, seed=sampling.seed + request.index)
