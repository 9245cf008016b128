"""The gRPC services of fake workers, with predictable tokens. `fake_workers` owns the workers' state and faults."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any
from zlib import crc32

from preft.core.cluster import Role
from preft.core.errors import InvalidRequest, PreftError, TransferFailed
from preft.core.request import FinishReason, PromptLogprobs, TokenDelta
from preft.rpc import common_pb2, workers_pb2, workers_pb2_grpc
from preft.rpc.caller import caller_of
from preft.rpc.convert import delta_to_proto
from preft.rpc.prompt_logprobs import prompt_parts
from preft.rpc.status import abort
from preft.worker.decode.session import DecodeSession, Put, Serve
from support.prompt_logprobs import made_up

if TYPE_CHECKING:
    from support.fake_workers import FakeDecode, FakePrefill, FakeWorker

EOS = 7


def token_at(prompt: Iterable[int], digest: str, index: int, position: int) -> int:
    """The token of choice `index` at `position` (0 is the first output token)."""
    return 1000 + crc32(repr((list(prompt), digest, index, position)).encode()) % 30000


@dataclass
class Kv:
    """The decode worker's state for one handle."""

    prompt: list[int]
    digest: str
    uses: int


class PrefillService(workers_pb2_grpc.PrefillWorkerServicer):
    def __init__(self, worker: FakePrefill) -> None:
        self.worker = worker

    async def Prefill(self, request: workers_pb2.PrefillRequest, context: Any) -> AsyncIterator[Any]:
        worker, caller = self.worker, caller_of(context)
        worker.callers.add(caller)
        worker.requests.append(request)
        worker.running += 1
        done = False
        try:
            with worker.usage.prefill(caller):
                async with aclosing(self._events(request, caller)) as events:
                    async for event in events:
                        yield event
            await asyncio.sleep(worker.linger)
            done = True
        except PreftError as error:
            await abort(context, error)
        finally:
            worker.running -= 1
            worker.cancelled += not done

    async def _events(self, request: workers_pb2.PrefillRequest, caller: str) -> AsyncGenerator[Any, None]:
        worker, handle = self.worker, request.target.handle
        with worker.prompting(request.adapter.digest, caller, len(request.prompt_token_ids)):
            if fault := worker.next_fault():
                await fault.strike()
            await asyncio.sleep(worker.delay)
        choices = [self._first(request, index) for index in range(1 if request.resume else request.n)]
        if request.sampling.HasField("prompt_logprobs") and not request.resume:
            for part in prompt_parts(self._prompt_logprobs(request)):
                yield workers_pb2.PrefillEvent(prompt_logprobs=part)
        first = workers_pb2.FirstTokens(choices=[delta_to_proto(choice) for choice in choices])
        yield workers_pb2.PrefillEvent(first_tokens=first)
        uses = request.n if request.resume else sum(choice.finish_reason is None for choice in choices)
        if request.HasField("target") and uses:
            push_fault = worker.push_faults.pop(0) if worker.push_faults else None
            if push_fault:
                await push_fault.strike()
            if not worker.pushes:
                return
            decode = worker.cluster.at(request.target.address)
            if decode is None or decode.role is not Role.DECODE or handle in decode.released:
                raise TransferFailed("the decode worker is gone or wants no KV")
            decode.handles[handle] = Kv(list(request.prompt_token_ids), request.adapter.digest, uses)
            yield workers_pb2.PrefillEvent(kv_pushed=workers_pb2.KvPushed())

    def _prompt_logprobs(self, request: workers_pb2.PrefillRequest) -> PromptLogprobs:
        return made_up(list(request.prompt_token_ids), request.sampling.prompt_logprobs, request.adapter.digest)

    def _first(self, request: workers_pb2.PrefillRequest, index: int) -> TokenDelta:
        if self.worker.cluster.ends.get(index) == 0:
            return TokenDelta(index, (EOS,), finish_reason=FinishReason.STOP)
        token = token_at(request.prompt_token_ids, request.adapter.digest, index, 0)
        last = request.sampling.max_tokens == 1 and not request.resume
        return TokenDelta(index, (token,), finish_reason=FinishReason.LENGTH if last else None)


class AdaptersService(workers_pb2_grpc.WorkerAdaptersServicer):
    def __init__(self, worker: FakeWorker) -> None:
        self.worker = worker

    async def Prefetch(self, request: common_pb2.AdapterRef, context: Any) -> workers_pb2.PrefetchReply:
        worker = self.worker
        worker.callers.add(caller_of(context))
        worker.prefetched.append(request.digest)
        if request.digest not in worker.adapters:
            worker.loading += (request.digest,)
        try:
            if worker.load_faults and (fault := worker.load_faults.pop(0)):
                await fault.strike()
            await asyncio.sleep(worker.load_seconds)
            worker.adapters = (*(digest for digest in worker.adapters if digest != request.digest), request.digest)
        except PreftError as error:
            await abort(context, error)
        finally:
            worker.loading = tuple(digest for digest in worker.loading if digest != request.digest)
        return workers_pb2.PrefetchReply()


class DecodeService(workers_pb2_grpc.DecodeWorkerServicer):
    def __init__(self, worker: FakeDecode) -> None:
        self.worker = worker

    async def Decode(
        self, commands: AsyncIterator[workers_pb2.DecodeCommand], context: Any
    ) -> AsyncIterator[workers_pb2.DecodeEvents]:
        caller = caller_of(context)
        self.worker.callers.add(caller)
        async with aclosing(DecodeSession(partial(self._begin, caller)).run(commands)) as batches:
            async for batch in batches:
                yield batch

    def _begin(self, caller: str, request: workers_pb2.DecodeRequest) -> Serve:
        self.worker.messages.append(request)
        return partial(self._serve, caller, request)

    async def _serve(
        self, caller: str, request: workers_pb2.DecodeRequest, choice: workers_pb2.DecodeChoice, put: Put
    ) -> None:
        with self.worker.usage.sequence(caller):
            await self._choose(caller, request, choice, put)

    async def _choose(
        self, caller: str, request: workers_pb2.DecodeRequest, choice: workers_pb2.DecodeChoice, put: Put
    ) -> None:
        worker = self.worker
        worker.choices.append(choice)
        worker.running += 1
        done = False
        kv = worker.handles.get(request.handle)
        try:
            faults = worker.choice_faults.get(choice.index, worker.faults)
            worker.calls += 1
            fault = faults.pop(0) if faults else None
            if worker.role is Role.COLOCATED:
                if request.adapter.digest != request.adapter_digest:
                    raise InvalidRequest("the request names one adapter and brings another")
                kv = Kv(list(request.prompt_token_ids), request.adapter.digest, 1)
            if kv is None or kv.uses == 0:
                raise TransferFailed("unknown handle")
            if kv.prompt != list(request.prompt_token_ids) or kv.digest != request.adapter_digest:
                raise TransferFailed("the handle is for another prompt or adapter")
            kv.uses -= 1
            begin = len(choice.output_token_ids)
            if worker.role is Role.COLOCATED:
                with worker.prompting(request.adapter.digest, caller, len(request.prompt_token_ids)):
                    await asyncio.sleep(worker.prompt_seconds)
            for position in range(begin, request.sampling.max_tokens):
                if fault and fault.after == position - begin:
                    await fault.strike()
                await asyncio.sleep(worker.delay)
                delta = self._token(request, choice.index, position)
                put(delta)
                if delta.finish_reason is not None:
                    break
            await asyncio.sleep(worker.linger)
            done = True
        except PreftError as error:
            put(error)
        finally:
            worker.running -= 1
            worker.cancelled += not done
            if kv is not None and kv.uses == 0:
                worker.handles.pop(request.handle, None)

    async def Release(self, request: workers_pb2.ReleaseRequest, context: Any) -> workers_pb2.ReleaseReply:
        self.worker.released.append(request.handle)
        self.worker.handles.pop(request.handle, None)
        return workers_pb2.ReleaseReply()

    def _token(self, request: workers_pb2.DecodeRequest, index: int, position: int) -> TokenDelta:
        if self.worker.cluster.ends.get(index) == position:
            return TokenDelta(index, (EOS,), finish_reason=FinishReason.STOP)
        token = token_at(request.prompt_token_ids, request.adapter_digest, index, position)
        last = position == request.sampling.max_tokens - 1
        prompt = None
        begins = self.worker.role is Role.COLOCATED and index == position == 0
        if begins and request.sampling.HasField("prompt_logprobs"):
            prompt = self._prompt_logprobs(request)
        return TokenDelta(index, (token,), finish_reason=FinishReason.LENGTH if last else None, prompt_logprobs=prompt)

    def _prompt_logprobs(self, request: workers_pb2.DecodeRequest) -> PromptLogprobs | None:
        return made_up(list(request.prompt_token_ids), request.sampling.prompt_logprobs, request.adapter_digest)
