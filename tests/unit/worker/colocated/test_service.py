"""The colocated service over real gRPC: whole choices, the adapter that was named or an error, and nothing kept."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import grpc.aio
import pytest

from preft.core.cluster import Role
from preft.core.errors import AdapterUnavailable, InvalidRequest, WorkerFull
from preft.core.request import AdapterRef, Sampling
from preft.memory.arena import StagingArena
from preft.router.decode_stream import DecodeCall, DecodeStream
from preft.rpc import workers_pb2, workers_pb2_grpc
from preft.rpc.convert import adapter_to_proto, sampling_to_proto
from preft.rpc.prompt_logprobs import PromptParts
from preft.worker.colocated.service import ColocatedService
from preft.worker.usage import Usage
from support.adapter_tiers import adapter_store
from support.fake_engine import FakeEngine, tokens_of
from support.prompt_logprobs import made_up
from support.worker_services import GREEDY, channel_to, failed, rest, until, write_adapter

PROMPT = (5, 6, 7, 8, 9)


class Rig:
    """A served ColocatedService and the engine below it."""

    def __init__(self, channel: grpc.aio.Channel, engine: FakeEngine, service: ColocatedService) -> None:
        self.stub = workers_pb2_grpc.DecodeWorkerStub(channel)
        self.stream = DecodeStream(self.stub, "colocated-0", lambda: None)
        self.engine = engine
        self.service = service

    def call(
        self,
        adapter: AdapterRef | None = None,
        output: Sequence[int] = (),
        sampling: Sampling = GREEDY,
        index: int = 0,
        digest: str | None = None,
        salt: str = "",
    ) -> DecodeCall:
        request = workers_pb2.DecodeRequest(
            request_id="r",
            handle="h",
            prompt_token_ids=PROMPT,
            sampling=sampling_to_proto(sampling),
            adapter_digest=digest if digest is not None else adapter.digest if adapter else "",
            adapter=adapter_to_proto(adapter) if adapter else None,
            cache_salt=salt,
            choices=[workers_pb2.DecodeChoice(index=index, output_token_ids=output)],
        )
        [call] = self.stream.start(request, 20.0)
        return call


@asynccontextmanager
async def colocated_rig(slots: int = 4) -> AsyncIterator[Rig]:
    arena, memory = StagingArena.create(1 << 16), StagingArena.create(1 << 16)
    engine = FakeEngine(Role.COLOCATED, arena.path, memory.path)
    try:
        async with AsyncExitStack() as opened:
            adapters = await opened.enter_async_context(adapter_store(engine, memory))
            service = ColocatedService(engine, adapters, Usage(slots))
            serve = channel_to(workers_pb2_grpc.add_DecodeWorkerServicer_to_server, service)
            channel = await opened.enter_async_context(serve)
            rig = Rig(channel, engine, service)
            yield rig
            await until(lambda: not (service.usage.running or engine.stats.running))
            await rig.stream.close()
    finally:
        arena.close()
        memory.close()
        await engine.close()


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    async with colocated_rig() as rig:
        yield rig


@pytest.fixture
def adapter(tmp_path: Path) -> AdapterRef:
    return write_adapter(tmp_path / "ada", "one")


@pytest.mark.parametrize("done", [0, 1, 3])
async def test_a_choice_from_prompt_to_end(rig: Rig, adapter: AdapterRef, done: int) -> None:
    for used in (None, adapter):
        whole = tokens_of(used.digest if used else "", PROMPT, GREEDY)
        assert await rest(rig.call(used, whole[:done])) == whole[done:]
    assert [request.adapter for request in rig.engine.requests] == [None, adapter]
    assert rig.engine.loaded == [adapter.digest]


async def test_each_choice_has_the_requests_salt(rig: Rig, adapter: AdapterRef) -> None:
    for used in (None, adapter):
        await rest(rig.call(used, salt="acme"))
    assert [request.salt for request in rig.engine.requests] == ["acme", "acme"]


async def test_each_choice_has_its_own_seed(rig: Rig) -> None:
    sampling = dataclasses.replace(GREEDY, temperature=1.0, seed=7)
    for index in range(3):
        own = dataclasses.replace(sampling, seed=7 + index)
        assert await rest(rig.call(sampling=sampling, index=index)) == tokens_of("", PROMPT, own, index=index)


async def test_choice_0_begins_with_the_prompts_log_probabilities(rig: Rig, adapter: AdapterRef) -> None:
    """No other choice has them, and none that goes on."""
    sampling = dataclasses.replace(GREEDY, prompt_logprobs=2)
    whole = tokens_of(adapter.digest, PROMPT, GREEDY)
    call, parts = rig.call(adapter, sampling=sampling), PromptParts(2, len(PROMPT))
    first = await call.read()
    assert not first.token_ids
    parts.add(first.prompt_logprobs)
    assert parts.whole() == made_up(PROMPT, 2, adapter.digest)
    assert await rest(call) == whole
    for other in rig.call(adapter, sampling=sampling, index=1), rig.call(adapter, whole[:1], sampling):
        assert not (await other.read()).HasField("prompt_logprobs")
        await rest(other)


async def test_an_adapter_that_isnt_the_named_one_is_refused(rig: Rig, adapter: AdapterRef) -> None:
    for call in (rig.call(adapter, digest="0" * 64), rig.call(adapter, digest=""), rig.call(None, digest="0" * 64)):
        tokens, error = await failed(call)
        assert (tokens, type(error)) == ([], InvalidRequest)
    assert rig.engine.requests == []


async def test_a_source_with_other_content_is_refused(rig: Rig, adapter: AdapterRef) -> None:
    (Path(adapter.source) / "adapter_model.safetensors").write_bytes(b"other")
    tokens, error = await failed(rig.call(adapter))
    assert (tokens, type(error)) == ([], AdapterUnavailable)
    assert rig.engine.requests == []


async def test_cancelling_ends_the_engine_s_work(rig: Rig, adapter: AdapterRef) -> None:
    rig.engine.going.clear()
    call = rig.call(adapter)
    await until(lambda: rig.engine.stats.running == 1)
    call.cancel()
    await until(lambda: rig.engine.stats.running == 0)
    assert rig.engine.aborts == 1


async def test_releasing_is_fine(rig: Rig) -> None:
    await rig.stub.Release(workers_pb2.ReleaseRequest(handle="h"))


async def test_a_choice_takes_a_slot_until_its_first_token(adapter: AdapterRef, tmp_path: Path) -> None:
    other = write_adapter(tmp_path / "bob", "two")
    async with colocated_rig(slots=1) as rig:
        rig.engine.one_by_one = asyncio.Semaphore(0)
        first = rig.call(adapter)
        await until(lambda: rig.engine.stats.running == 1)
        base = rig.call()
        await until(lambda: rig.engine.stats.running == 2)
        tokens, error = await failed(rig.call(other))
        assert (tokens, type(error)) == ([], WorkerFull)
        assert rig.engine.loaded == [adapter.digest]
        rig.engine.one_by_one.release()
        await first.read()
        assert list(rig.service.usage.prompted) == []
        assert rig.service.usage.other_sequences("another") == 2
        second = rig.call(other)
        await until(lambda: rig.engine.stats.running == 3)
        assert list(rig.service.usage.prompted) == [other.digest]
        second.cancel()
        await until(lambda: list(rig.service.usage.prompted) == [])
        for _ in range(20):
            rig.engine.one_by_one.release()
        await rest(first)
        await rest(base)
