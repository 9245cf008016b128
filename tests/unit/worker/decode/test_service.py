"""Decode over real gRPC: the exact continuation of verified KV, or an error that says why; nothing is ever kept."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator

import grpc
import pytest

from preft.core.errors import (
    DeadlineExceeded,
    EngineFailed,
    InvalidRequest,
    NumbersNotFinite,
    PreftError,
    TransferFailed,
    WorkerLost,
)
from preft.core.request import FinishReason, KvHeader, Sampling
from preft.memory.arena import HEADER_BYTES, span_of
from preft.router.decode_stream import DecodeCall
from preft.rpc import workers_pb2
from preft.rpc.convert import sampling_to_proto
from preft.rpc.secret import CALLER_KEY
from preft.transfer.port import hash_prompt
from support.fake_engine import tokens_of
from support.worker_services import (
    ARENA_BYTES,
    FINGERPRINT,
    GREEDY,
    DecodeRig,
    broken,
    code_of,
    decode_rig,
    deltas_of,
    failed,
    rest,
    until,
)

PROMPT = (5, 6, 7, 8, 9)
DIGEST = "d" * 64
ALL = tokens_of(DIGEST, PROMPT, GREEDY)
LONG = dataclasses.replace(GREEDY, max_tokens=100_000)


@pytest.fixture
async def rig() -> AsyncIterator[DecodeRig]:
    async with decode_rig() as rig:
        yield rig


async def refused(call: DecodeCall, says: str) -> None:
    """The choice ends without a token, for this reason."""
    tokens, error = await failed(call)
    assert (tokens, type(error)) == ([], TransferFailed)
    assert says in str(error)


async def test_goes_on_where_prefill_ended(rig: DecodeRig) -> None:
    await rig.sink.deliver("h", DIGEST, PROMPT)
    deltas = await deltas_of(rig.call(PROMPT, ALL[:1], digest=DIGEST))
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
    deltas = await deltas_of(rig.call(PROMPT, ALL[:1], sampling, digest=DIGEST, index=7))
    assert [delta.token_ids for delta in deltas] == [(ALL[1],), (ALL[2],)]
    assert (deltas[-1].finish_reason, deltas[-1].stop_token_id) == (FinishReason.STOP, ALL[2])
    assert {delta.index for delta in deltas} == {7}
    assert [len(entry.top) for delta in deltas for entry in delta.logprobs] == [2, 2]
    (request,) = rig.engine.requests
    assert request.sampling == sampling
    assert (request.adapter, request.save) == (None, None)


@pytest.mark.parametrize(
    ("own", "digest", "salt"),
    [("", "", ""), ("", DIGEST, f"{DIGEST}:5"), ("acme", "", "acme"), ("acme", DIGEST, f"acme:{DIGEST}:5")],
)
async def test_the_salt_separates_what_tokens_alone_must_not_share(
    rig: DecodeRig, own: str, digest: str, salt: str
) -> None:
    """After the prompt KV is the base model's, so that equal tokens under another prompt length are other KV."""
    await rig.sink.deliver("h", digest, PROMPT)
    await rig.run(PROMPT, [1], digest=digest, salt=own)
    assert rig.engine.requests[0].salt == salt


async def test_unknown_handle(rig: DecodeRig) -> None:
    await refused(
        rig.call(PROMPT, ALL[:1], digest=DIGEST),
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
        f"KV handle h was made for another {what}",
    )
    assert rig.engine.requests == []
    assert await rig.run(PROMPT, ALL[:1], digest=DIGEST) == ALL[1:]  # the right request still finds it


async def test_a_handle_that_is_used_up(rig: DecodeRig) -> None:
    await rig.sink.deliver("h", DIGEST, PROMPT)
    await rig.run(PROMPT, ALL[:1], digest=DIGEST)
    await refused(rig.call(PROMPT, ALL[:1], digest=DIGEST), "is used up")


@pytest.mark.parametrize(("prompt", "output"), [(PROMPT, ()), ((), (1,)), ((), ())])
async def test_nothing_to_go_on_from(rig: DecodeRig, prompt: tuple[int, ...], output: tuple[int, ...]) -> None:
    await rig.sink.deliver("h", DIGEST, PROMPT)
    with pytest.raises(InvalidRequest) as raised:
        await rig.run(prompt, output, digest=DIGEST)
    assert raised.value.param == ("output_token_ids" if prompt else "prompt_token_ids")
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


@pytest.mark.parametrize(
    ("limits", "error"),
    [({"timeout": 0.2}, DeadlineExceeded), ({"kv_timeout": 0.2}, TransferFailed)],
    ids=["the choice's", "the transfer's"],
)
async def test_kv_that_does_not_arrive_in_time(
    rig: DecodeRig, limits: dict[str, float], error: type[PreftError]
) -> None:
    header = KvHeader("h", FINGERPRINT, DIGEST, len(PROMPT), 100, 0, 1, hash_prompt(PROMPT))
    rig.sink.handles.open(header, lambda reason: None)
    with pytest.raises(error, match=r"within 0\.2 s"):
        await rig.run(PROMPT, ALL[:1], digest=DIGEST, **limits)
    await until(lambda: rig.service.usage.running == 0)
    assert rig.sink.handles.open_handles == 1  # the push may still come, and its sender will hear of it
    rig.sink.handles.release("h")


@pytest.mark.parametrize("made", [0, 2])
async def test_the_engine_gives_the_request_up(rig: DecodeRig, made: int) -> None:
    rig.engine.failing = lambda request, tokens: EngineFailed("no reason") if tokens == made else None
    await rig.sink.deliver("h", DIGEST, PROMPT)
    tokens, error = await failed(rig.call(PROMPT, ALL[:1], digest=DIGEST))
    assert (tokens, type(error), str(error)) == (ALL[1 : 1 + made], EngineFailed, "no reason")  # the KV is there still


async def test_numbers_that_overflow_are_no_lost_kv(rig: DecodeRig) -> None:
    rig.engine.failing = lambda request, tokens: NumbersNotFinite("overflow") if tokens == 1 else None
    await rig.sink.deliver("h", DIGEST, PROMPT)
    tokens, error = await failed(rig.call(PROMPT, ALL[:1], digest=DIGEST))
    assert (tokens, type(error), str(error)) == (ALL[1:2], NumbersNotFinite, "overflow")


async def test_a_dead_engine_is_a_lost_worker(rig: DecodeRig) -> None:
    await rig.sink.deliver("h", DIGEST, PROMPT, uses=2)
    call = rig.call(PROMPT, ALL[:1], LONG, digest=DIGEST)
    await call.read()
    rig.engine.die("killed")
    for told, dead in enumerate((call, rig.call(PROMPT, ALL[:1], digest=DIGEST)), 1):
        with pytest.raises(WorkerLost, match="the engine died: killed"):
            await rest(dead)
        assert rig.lost == told


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
    with pytest.raises(TransferFailed, match=r"KV cache had to make room for others, and was needed again"):
        await rest(call)
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
    assert rig.service.usage.running == 1
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
    await until(lambda: rig.service.usage.running == 1)
    call.cancel()
    await until(lambda: rig.service.usage.running == 0)
    assert rig.engine.requests == []
    rig.sink.handles.release("h")


@pytest.mark.parametrize("tokens_come", [True, False])
async def test_a_caller_that_reads_nothing_and_goes(rig: DecodeRig, tokens_come: bool) -> None:
    """With the stream all of its choices end, also before its first message."""
    if not tokens_come:
        rig.engine.going.clear()
    await rig.sink.deliver("h", DIGEST, PROMPT, uses=2)
    calls = [rig.call(PROMPT, ALL[:1], LONG, digest=DIGEST, index=index) for index in range(2)]
    await until(lambda: rig.engine.stats.running == 2)
    await rig.stream.close()
    await until(rig.idle)
    for call in calls:
        with pytest.raises(WorkerLost):
            await rest(call)


async def test_a_caller_that_goes_at_once(rig: DecodeRig) -> None:
    call = rig.call(PROMPT, ALL[:1], LONG, digest=DIGEST)
    await rig.stream.close()
    with pytest.raises(WorkerLost):
        await rest(call)
    assert rig.stream.broken


async def test_choices_do_not_disturb_each_other(rig: DecodeRig) -> None:
    """One is refused, one is cancelled, one fails in between: the others' tokens are what they are alone."""
    names = [f"h{number}" for number in range(6)]
    for name in names:
        await rig.sink.deliver(name, DIGEST, PROMPT)
    await rig.sink.deliver("doomed", DIGEST, PROMPT)
    rig.engine.failing = lambda request, tokens: (
        EngineFailed("no reason") if "doomed" in request.request_id and tokens == 2 else None
    )
    going = [asyncio.create_task(rig.run(PROMPT, ALL[:1], digest=DIGEST, handle=name)) for name in names]
    unknown = rig.call(PROMPT, ALL[:1], digest=DIGEST, handle="never-heard-of")
    doomed = rig.call(PROMPT, ALL[:1], LONG, digest=DIGEST, handle="doomed")
    await rig.sink.deliver("unwanted", DIGEST, PROMPT)
    unwanted = rig.call(PROMPT, ALL[:1], LONG, digest=DIGEST, handle="unwanted")
    await unwanted.read()
    unwanted.cancel()
    await refused(unknown, "is unknown")
    tokens, error = await failed(doomed)
    assert (tokens, type(error)) == (ALL[1:3], EngineFailed)
    assert await asyncio.gather(*going) == [ALL[1:]] * len(names)
    assert not rig.stream.broken


async def test_tokens_of_one_step_come_in_one_message(rig: DecodeRig) -> None:
    """The point of the shared call: far fewer messages than tokens."""
    rig.engine.going.clear()
    await rig.sink.deliver("h", DIGEST, PROMPT, uses=20)
    events = []

    async def commands() -> AsyncIterator[workers_pb2.DecodeCommand]:
        choices = [workers_pb2.DecodeChoice(id=i, index=i, output_token_ids=ALL[:1]) for i in range(20)]
        request = workers_pb2.DecodeRequest(
            request_id="r",
            handle="h",
            prompt_token_ids=PROMPT,
            sampling=sampling_to_proto(GREEDY),
            adapter_digest=DIGEST,
            kv_timeout=5,
            choices=choices,
        )
        yield workers_pb2.DecodeCommand(start=request)
        await until(lambda: rig.engine.stats.running == 20)
        rig.engine.going.set()

    messages = 0
    async for message in rig.stub.Decode(commands()):
        messages += 1
        events += message.events
    assert len(events) == 20 * 5
    assert messages < 50


async def test_an_id_in_use_ends_the_call(rig: DecodeRig) -> None:
    rig.engine.going.clear()
    await rig.sink.deliver("h", DIGEST, PROMPT, uses=2)
    choice = workers_pb2.DecodeChoice(id=7, output_token_ids=ALL[:1])
    request = workers_pb2.DecodeRequest(
        request_id="r",
        handle="h",
        prompt_token_ids=PROMPT,
        adapter_digest=DIGEST,
        sampling=sampling_to_proto(LONG),
        choices=[choice],
    )

    async def commands() -> AsyncIterator[workers_pb2.DecodeCommand]:
        for _ in range(2):
            yield workers_pb2.DecodeCommand(start=request)
        await asyncio.sleep(60)

    messages, error = await broken(rig.stub.Decode(commands()))
    assert (messages, error.code()) == ([], grpc.StatusCode.INVALID_ARGUMENT)
    assert "id 7 is in use" in (error.details() or "")
    rig.sink.handles.release("h")


async def test_a_request_of_many_choices_lets_other_work_in_between(rig: DecodeRig) -> None:
    """Each choice of a long prompt takes the engine's client some milliseconds: all at once would be a stall."""
    rig.engine.going.clear()
    await rig.sink.deliver("h", DIGEST, PROMPT, uses=50)
    most, before = 0, 0

    async def watch() -> None:
        nonlocal most, before
        while True:
            started = len(rig.engine.requests)
            most, before = max(most, started - before), started
            await asyncio.sleep(0)

    watching = asyncio.create_task(watch())
    choices = [workers_pb2.DecodeChoice(index=index, output_token_ids=ALL[:1]) for index in range(50)]
    request = workers_pb2.DecodeRequest(
        handle="h",
        prompt_token_ids=PROMPT,
        sampling=sampling_to_proto(LONG),
        adapter_digest=DIGEST,
        kv_timeout=5,
        choices=choices,
    )
    calls = rig.stream.start(request, 20)
    await until(lambda: len(rig.engine.requests) == 50)
    assert most <= 2
    for call in calls:
        call.cancel()
    await until(rig.idle)
    watching.cancel()


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
    await rig.stub.Release(workers_pb2.ReleaseRequest(handle="never-heard-of"))
    await refused(rig.call(PROMPT, ALL[:1], digest=DIGEST), "h was released")


async def test_release_leaves_running_requests_alone(rig: DecodeRig) -> None:
    await rig.sink.deliver("h", DIGEST, PROMPT, uses=2)
    call = rig.call(PROMPT, ALL[:1], digest=DIGEST)
    tokens = list((await call.read()).token_ids)
    await rig.stub.Release(workers_pb2.ReleaseRequest(handle="h"))
    assert [*tokens, *await rest(call)] == ALL[1:]


async def test_each_choice_counts_for_its_caller(rig: DecodeRig) -> None:
    usage = rig.service.usage
    await rig.sink.deliver("h", DIGEST, PROMPT, uses=2)
    rig.engine.going.clear()
    request = workers_pb2.DecodeRequest(
        handle="h",
        prompt_token_ids=PROMPT,
        sampling=sampling_to_proto(GREEDY),
        adapter_digest=DIGEST,
        kv_timeout=20,
        choices=[workers_pb2.DecodeChoice(id=number, index=number, output_token_ids=ALL[:1]) for number in range(2)],
    )
    call = rig.stub.Decode(metadata=((CALLER_KEY, "one"),))
    await call.write(workers_pb2.DecodeCommand(start=request))
    await until(lambda: usage.running == 2)
    assert [usage.other_sequences(name) for name in ("one", "two")] == [0, 2]
    await call.write(workers_pb2.DecodeCommand(cancel=1))
    await until(lambda: usage.other_sequences("two") == 1)
    call.cancel()
    await until(lambda: usage.running == 0)


async def test_a_caller_s_name_is_checked(rig: DecodeRig) -> None:
    call = rig.stub.Decode(metadata=((CALLER_KEY, "x" * 300),))
    _, error = await broken(call)
    assert (error.code(), code_of(error)) == (grpc.StatusCode.INVALID_ARGUMENT, "invalid_request")
