"""Decode over real gRPC: the exact continuation of verified KV, or an error that says why; nothing is ever kept."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import pytest

from preft.core.errors import EngineFailed
from preft.core.request import FinishReason, Sampling
from preft.rpc import workers_pb2
from preft.rpc.convert import delta_from_proto
from preft.rpc.status import PARAM_KEY
from preft.transfer.port import KvHeader, hash_prompt
from preft.transfer.staging import HEADER_BYTES, span_of
from support.fake_engine import tokens_of
from support.worker_services import (
    ARENA_BYTES,
    FINGERPRINT,
    GREEDY,
    DecodeRig,
    broken,
    code_of,
    decode_rig,
    rest,
    until,
)

PROMPT = (5, 6, 7, 8, 9)
DIGEST = "d" * 64
ALL = tokens_of(DIGEST, PROMPT, GREEDY)
LONG = dataclasses.replace(GREEDY, max_tokens=100)


@pytest.fixture
async def rig() -> AsyncIterator[DecodeRig]:
    async with decode_rig() as rig:
        yield rig


async def refused(call: Any, status: grpc.StatusCode, code: str, says: str) -> None:
    """The call ends without a token, for this reason."""
    messages, error = await broken(call)
    assert (messages, error.code(), code_of(error)) == ([], status, code)
    assert says in (error.details() or "")


async def test_goes_on_where_prefill_ended(rig: DecodeRig) -> None:
    await rig.sink.deliver("h", DIGEST, PROMPT)
    deltas = [delta_from_proto(message) async for message in rig.call(PROMPT, ALL[:1], digest=DIGEST)]
    assert [token for delta in deltas for token in delta.token_ids] == ALL[1:]
    assert [delta.finish_reason for delta in deltas] == [None] * 4 + [FinishReason.LENGTH]
    assert {delta.index for delta in deltas} == {0}


async def test_goes_on_after_any_number_of_tokens(rig: DecodeRig) -> None:
    for done in range(1, len(ALL)):
        await rig.sink.deliver(f"h{done}", DIGEST, PROMPT)
        assert await rig.run(PROMPT, ALL[:done], digest=DIGEST, handle=f"h{done}") == ALL[done:]


async def test_what_another_adapter_made_would_show(rig: DecodeRig) -> None:
    """The tests above can fail: the same tokens over other KV go on differently."""
    await rig.sink.deliver("h", "", PROMPT)
    assert await rig.run(PROMPT, ALL[:1]) == tokens_of("", PROMPT, GREEDY, output=ALL[:1]) != ALL[1:]


async def test_choices_share_one_handle(rig: DecodeRig) -> None:
    """Choice i has seed + i, and its own engine request."""
    sampling = Sampling(max_tokens=8, temperature=1.0, seed=40)
    await rig.sink.deliver("h", DIGEST, PROMPT, uses=3)
    expected = [
        tokens_of(DIGEST, PROMPT, dataclasses.replace(sampling, seed=40 + index), index=index) for index in range(3)
    ]
    got = await asyncio.gather(
        *(rig.run(PROMPT, expected[index][:1], sampling, digest=DIGEST, index=index) for index in range(3))
    )
    assert got == [tokens[1:] for tokens in expected]
    assert len({tuple(tokens) for tokens in got}) == 3
    assert len({request.request_id for request in rig.engine.requests}) == 3


async def test_the_whole_message_reaches_the_engine_and_back(rig: DecodeRig) -> None:
    sampling = Sampling(max_tokens=9, temperature=0.0, stop_token_ids=(ALL[2],), logprobs=2)
    await rig.sink.deliver("h", DIGEST, PROMPT)
    call = rig.call(PROMPT, ALL[:1], sampling, digest=DIGEST, index=7)
    deltas = [delta_from_proto(message) async for message in call]
    assert [delta.token_ids for delta in deltas] == [(ALL[1],), (ALL[2],)]
    assert (deltas[-1].finish_reason, deltas[-1].stop_token_id) == (FinishReason.STOP, ALL[2])
    assert {delta.index for delta in deltas} == {7}
    assert [len(entry.top) for delta in deltas for entry in delta.logprobs] == [2, 2]
    (request,) = rig.engine.requests
    assert request.sampling == sampling
    assert (request.adapter, request.save) == (None, None)


@pytest.mark.parametrize(("digest", "salt"), [("", ""), (DIGEST, f"{DIGEST}:5")], ids=["base", "adapter"])
async def test_the_salt_separates_what_tokens_alone_must_not_share(rig: DecodeRig, digest: str, salt: str) -> None:
    """After the prompt KV is the base model's, so that equal tokens under another prompt length are other KV."""
    await rig.sink.deliver("h", digest, PROMPT)
    await rig.run(PROMPT, [1], digest=digest)
    assert rig.engine.requests[0].salt == salt


async def test_unknown_handle(rig: DecodeRig) -> None:
    await refused(
        rig.call(PROMPT, ALL[:1], digest=DIGEST),
        grpc.StatusCode.DATA_LOSS,
        "kv_transfer_failed",
        "KV handle h is unknown",
    )
    assert rig.engine.requests == []


@pytest.mark.parametrize(
    ("prompt", "digest", "what"),
    [
        (PROMPT, "e" * 64, "adapter"),
        (PROMPT, "", "adapter"),
        ((5, 6, 7, 8, 10), DIGEST, "prompt"),
        ((*PROMPT, 10), DIGEST, "number of prompt tokens"),
    ],
)
async def test_kv_of_something_else(rig: DecodeRig, prompt: tuple[int, ...], digest: str, what: str) -> None:
    await rig.sink.deliver("h", DIGEST, PROMPT)
    await refused(
        rig.call(prompt, ALL[:1], digest=digest),
        grpc.StatusCode.DATA_LOSS,
        "kv_transfer_failed",
        f"KV handle h was made for another {what}",
    )
    assert rig.engine.requests == []
    assert await rig.run(PROMPT, ALL[:1], digest=DIGEST) == ALL[1:]  # the right request still finds it


async def test_a_handle_that_is_used_up(rig: DecodeRig) -> None:
    await rig.sink.deliver("h", DIGEST, PROMPT)
    await rig.run(PROMPT, ALL[:1], digest=DIGEST)
    await refused(
        rig.call(PROMPT, ALL[:1], digest=DIGEST), grpc.StatusCode.DATA_LOSS, "kv_transfer_failed", "is used up"
    )


@pytest.mark.parametrize(("prompt", "output"), [(PROMPT, ()), ((), (1,)), ((), ())])
async def test_nothing_to_go_on_from(rig: DecodeRig, prompt: tuple[int, ...], output: tuple[int, ...]) -> None:
    await rig.sink.deliver("h", DIGEST, PROMPT)
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await rig.run(prompt, output, digest=DIGEST)
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert dict(raised.value.trailing_metadata() or ())[PARAM_KEY] == "output_token_ids"
    rig.sink.handles.release("h")


async def test_kv_that_is_still_arriving_is_waited_for(rig: DecodeRig) -> None:
    size = rig.engine.info.block_bytes
    region = await rig.sink.arena.reserve(2 * size + 16, timeout=1)
    header = KvHeader("h", FINGERPRINT, DIGEST, len(PROMPT), region.size, 0, 1, hash_prompt(PROMPT))
    rig.sink.handles.open(header, lambda reason: None)
    running = asyncio.create_task(rig.run(PROMPT, ALL[:1], digest=DIGEST))
    await asyncio.sleep(0.05)
    assert rig.engine.requests == []
    await rig.sink.deliver("other", DIGEST, PROMPT)
    rig.sink.arena.view(region)[:] = await rig.sink.received("other", DIGEST, PROMPT)
    rig.sink.handles.ready("h", region)
    assert await running == ALL[1:]


async def test_kv_that_does_not_arrive_in_the_call_s_time(rig: DecodeRig) -> None:
    header = KvHeader("h", FINGERPRINT, DIGEST, len(PROMPT), 100, 0, 1, hash_prompt(PROMPT))
    rig.sink.handles.open(header, lambda reason: None)
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await rig.run(PROMPT, ALL[:1], digest=DIGEST, timeout=0.2)
    assert raised.value.code() in (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.DATA_LOSS)
    await until(lambda: rig.service.running == 0)
    assert rig.sink.handles.open_handles == 1  # the push may still come, and its sender will hear of it
    rig.sink.handles.release("h")


@pytest.mark.parametrize("made", [0, 2])
async def test_the_engine_gives_the_request_up(rig: DecodeRig, made: int) -> None:
    rig.engine.failing = lambda request, tokens: EngineFailed("no reason") if tokens == made else None
    await rig.sink.deliver("h", DIGEST, PROMPT)
    messages, error = await broken(rig.call(PROMPT, ALL[:1], digest=DIGEST))
    assert [token for delta in messages for token in delta.token_ids] == ALL[1 : 1 + made]
    assert error.code() is grpc.StatusCode.DATA_LOSS
    assert "the prompt's KV cache is no longer there: no reason" in (error.details() or "")


async def test_a_dead_engine_is_a_lost_worker(rig: DecodeRig) -> None:
    await rig.sink.deliver("h", DIGEST, PROMPT, uses=2)
    call = rig.call(PROMPT, ALL[:1], LONG, digest=DIGEST)
    await call.read()
    rig.engine.die("killed")
    for dead in (call, rig.call(PROMPT, ALL[:1], digest=DIGEST)):
        with pytest.raises(grpc.aio.AioRpcError, match="the engine died: killed") as raised:
            await rest(dead)
        assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
        assert code_of(raised.value) == "worker_lost"


async def test_preempted_requests_take_the_kept_copy(rig: DecodeRig) -> None:
    await rig.sink.deliver("h", DIGEST, PROMPT)
    call = rig.call(PROMPT, ALL[:1], digest=DIGEST)
    first = await call.read()
    rig.engine.preempt()
    assert [*first.token_ids, *await rest(call)] == ALL[1:]


async def test_preempted_requests_whose_copy_had_to_make_room_fail(rig: DecodeRig) -> None:
    """The region is reused meanwhile; what lies there now is never taken for the prompt's KV."""
    await rig.sink.deliver("h", DIGEST, PROMPT)
    call = rig.call(PROMPT, ALL[:1], LONG, digest=DIGEST)
    await call.read()
    rig.engine.going.clear()
    await until(lambda: rig.engine.stats.running == 1)
    other = await rig.sink.arena.reserve(ARENA_BYTES - HEADER_BYTES, timeout=0.1)
    rig.engine.preempt()
    rig.engine.going.set()
    with pytest.raises(grpc.aio.AioRpcError, match=r"KV cache is no longer there") as raised:
        await rest(call)
    assert raised.value.code() is grpc.StatusCode.DATA_LOSS
    rig.sink.arena.release(other)


async def test_a_copy_that_was_not_loaded_yet_makes_no_room(rig: DecodeRig) -> None:
    rig.engine.going.clear()
    await rig.sink.deliver("h", DIGEST, PROMPT)
    running = asyncio.create_task(rig.run(PROMPT, ALL[:1], digest=DIGEST))
    await until(lambda: rig.engine.stats.running == 1)
    crowd = asyncio.create_task(rig.sink.arena.reserve(ARENA_BYTES - HEADER_BYTES, timeout=5))
    await asyncio.sleep(0.02)
    assert not crowd.done()
    rig.engine.going.set()
    assert await running == ALL[1:]
    rig.sink.arena.release(await crowd)


async def test_cancelled_while_tokens_come(rig: DecodeRig) -> None:
    await rig.sink.deliver("h", DIGEST, PROMPT)
    call = rig.call(PROMPT, ALL[:1], LONG, digest=DIGEST)
    await call.read()
    assert rig.service.running == 1
    call.cancel()
    await until(rig.idle)
    assert (rig.engine.aborts, rig.engine.stats.running, rig.engine.stats.kv_usage) == (1, 0, 0.0)


async def test_cancelled_before_the_first_token(rig: DecodeRig) -> None:
    rig.engine.going.clear()
    await rig.sink.deliver("h", DIGEST, PROMPT)
    call = rig.call(PROMPT, ALL[:1], digest=DIGEST)
    await until(lambda: rig.engine.stats.running == 1)
    call.cancel()
    await until(rig.idle)
    assert rig.engine.aborts == 1


async def test_cancelled_while_the_kv_arrives(rig: DecodeRig) -> None:
    header = KvHeader("h", FINGERPRINT, DIGEST, len(PROMPT), 100, 0, 1, hash_prompt(PROMPT))
    rig.sink.handles.open(header, lambda reason: None)
    call = rig.call(PROMPT, ALL[:1], digest=DIGEST)
    await until(lambda: rig.service.running == 1)
    call.cancel()
    await until(lambda: rig.service.running == 0)
    assert rig.engine.requests == []
    rig.sink.handles.release("h")


async def test_a_client_that_reads_nothing_and_goes(rig: DecodeRig) -> None:
    await rig.sink.deliver("h", DIGEST, PROMPT)
    call = rig.call(PROMPT, ALL[:1], LONG, digest=DIGEST)
    await until(lambda: rig.engine.stats.running == 1)
    call.cancel()
    del call
    await until(rig.idle)


async def test_many_cancelled_at_random_moments_leave_nothing(rig: DecodeRig) -> None:
    for step in range(60):
        await rig.sink.deliver(f"h{step}", DIGEST, PROMPT)
        call = rig.call(PROMPT, ALL[:1], LONG, digest=DIGEST, handle=f"h{step}")
        await asyncio.sleep(step * 1e-4)
        call.cancel()
        rig.sink.handles.release(f"h{step}")
    await until(rig.idle)
    assert rig.engine.stats.running == 0
    await rig.sink.deliver("last", DIGEST, PROMPT)
    assert await rig.run(PROMPT, ALL[:1], digest=DIGEST, handle="last") == ALL[1:]


async def test_release_frees_what_nobody_will_claim(rig: DecodeRig) -> None:
    await rig.sink.deliver("h", DIGEST, PROMPT)
    assert rig.sink.arena.used == span_of(2 * rig.engine.info.block_bytes + 16)
    await rig.stub.Release(workers_pb2.ReleaseRequest(handle="h"))
    assert rig.idle()
    await rig.stub.Release(workers_pb2.ReleaseRequest(handle="h"))
    await rig.stub.Release(workers_pb2.ReleaseRequest(handle="never heard of"))
    await refused(
        rig.call(PROMPT, ALL[:1], digest=DIGEST), grpc.StatusCode.DATA_LOSS, "kv_transfer_failed", "h was released"
    )


async def test_release_leaves_running_requests_alone(rig: DecodeRig) -> None:
    await rig.sink.deliver("h", DIGEST, PROMPT, uses=2)
    call = rig.call(PROMPT, ALL[:1], digest=DIGEST)
    tokens = list((await call.read()).token_ids)
    await rig.stub.Release(workers_pb2.ReleaseRequest(handle="h"))
    assert [*tokens, *await rest(call)] == ALL[1:]
