"""Prefill over real gRPC: first tokens, then exactly the prompt's KV is sent, or an error says why; nothing stays."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from preft.core.errors import EngineFailed, NumbersNotFinite, PreftError, WorkerLost
from preft.core.request import AdapterRef, FinishReason, Sampling
from preft.engine.port import EngineRequest
from preft.memory.arena import HEADER_BYTES
from preft.rpc.prompt_logprobs import PromptParts
from preft.transfer.seal import SEAL, read_seal
from support.fake_engine import FakeEngine, kv_of, tokens_of
from support.prompt_logprobs import made_up
from support.readable_ref import ReadableRef
from support.worker_services import (
    ARENA_BYTES,
    GREEDY,
    KvSink,
    PrefillRig,
    broken,
    code_of,
    prefill_rig,
    until,
    write_adapter,
)

PROMPT = (5, 6, 7, 8, 9)
ONE = dataclasses.replace(GREEDY, max_tokens=1)
SAMPLED = Sampling(max_tokens=8, temperature=1.0, seed=40)


@pytest.fixture
async def rig() -> AsyncIterator[PrefillRig]:
    async with prefill_rig() as rig:
        yield rig


@pytest.fixture
def alice(tmp_path: Path) -> AdapterRef:
    return write_adapter(tmp_path / "alice", "alice's")


class Forgetful(FakeEngine):
    """Computes the prompt and saves nothing."""

    def generate(self, request: EngineRequest) -> Any:
        return super().generate(dataclasses.replace(request, save=None))


async def fails(call: Any, status: grpc.StatusCode, code: str, says: str, events: int = 0) -> None:
    """The call ends for this reason after so many events."""
    got, error = await broken(call)
    assert (len(got), error.code(), code_of(error)) == (events, status, code)
    assert says in (error.details() or "")


async def test_first_token_then_the_kv(rig: PrefillRig, alice: AdapterRef) -> None:
    events = [event async for event in rig.call(PROMPT, adapter=alice)]
    assert [event.WhichOneof("event") for event in events] == ["first_tokens", "kv_pushed"]
    (choice,) = events[0].first_tokens.choices
    assert list(choice.token_ids) == tokens_of(alice.digest, PROMPT, GREEDY)[:1]
    assert choice.finish_reason == 0  # the engine's "length" is ours, not the request's
    payload = await rig.sink.received("h", alice.digest, PROMPT)
    assert payload[: -SEAL.size] == kv_of(alice.digest, PROMPT)
    assert read_seal(memoryview(payload)) == len(PROMPT)
    assert rig.engine.prompt_tokens_computed == len(PROMPT)


async def test_the_base_model(rig: PrefillRig) -> None:
    (delta,) = await rig.run(PROMPT)
    assert list(delta.token_ids) == tokens_of("", PROMPT, GREEDY)[:1]
    assert (await rig.sink.received("h", "", PROMPT))[: -SEAL.size] == kv_of("", PROMPT)
    assert rig.engine.loaded == []
    assert rig.engine.requests[0].adapter is None


async def test_each_choice_has_the_requests_salt(rig: PrefillRig, alice: AdapterRef) -> None:
    await rig.run(PROMPT, SAMPLED, adapter=alice, n=3, salt="acme")
    assert [request.salt for request in rig.engine.requests] == ["acme"] * 3
    await fails(rig.call(PROMPT, salt="a\n"), grpc.StatusCode.INVALID_ARGUMENT, "invalid_request", "cache_salt")


@pytest.mark.parametrize("length", [1, 3, 4, 5, 64])
async def test_any_prompt_length(rig: PrefillRig, length: int) -> None:
    prompt = tuple(range(length))
    await rig.run(prompt)
    assert (await rig.sink.received("h", "", prompt))[: -SEAL.size] == kv_of("", prompt)


async def test_choices_share_one_prompt_pass(rig: PrefillRig, alice: AdapterRef) -> None:
    deltas = await rig.run(PROMPT, SAMPLED, adapter=alice, n=4)
    assert [delta.index for delta in deltas] == [0, 1, 2, 3]
    for index, delta in enumerate(deltas):
        own = dataclasses.replace(SAMPLED, seed=40 + index)
        assert list(delta.token_ids) == tokens_of(alice.digest, PROMPT, own, index=index)[:1]
        assert delta.finish_reason is None
    assert len({delta.token_ids for delta in deltas}) == 4
    assert [request.save is not None for request in rig.engine.requests] == [True, False, False, False]
    assert len({request.request_id for request in rig.engine.requests}) == 4
    for _ in range(4):
        await rig.sink.received("h", alice.digest, PROMPT)
    assert rig.sink.handles.open_handles == 0


async def test_only_choices_that_go_on_may_claim_the_kv(rig: PrefillRig) -> None:
    """Choice 1's first token is its stop token: two of three are left."""
    stop = tokens_of("", PROMPT, dataclasses.replace(SAMPLED, seed=41), index=1)[0]
    deltas = await rig.run(PROMPT, dataclasses.replace(SAMPLED, stop_token_ids=(stop,)), n=3)
    assert [delta.finish_reason for delta in deltas] == [None, FinishReason.STOP, None]
    assert deltas[1].stop_token_id == stop
    for _ in range(2):
        await rig.sink.received("h", "", PROMPT)
    assert rig.sink.handles.open_handles == 0


async def test_one_token_needs_no_decode_worker(rig: PrefillRig) -> None:
    (delta,) = await rig.run(PROMPT, ONE, to=None)
    assert list(delta.token_ids) == tokens_of("", PROMPT, ONE)
    assert delta.finish_reason is FinishReason.LENGTH
    assert rig.engine.requests[0].save is None
    assert rig.sink.handles.open_handles == 0


async def test_eos_as_first_token_ends_the_request(rig: PrefillRig) -> None:
    eos = tokens_of("", PROMPT, GREEDY)[0]
    (delta,) = await rig.run(PROMPT, dataclasses.replace(GREEDY, eos_token_ids=(eos,)))
    assert (delta.token_ids, delta.finish_reason, delta.stop_token_id) == ((eos,), FinishReason.STOP, None)
    assert rig.sink.handles.open_handles == 0


async def test_min_tokens_holds_eos_back(rig: PrefillRig) -> None:
    eos = tokens_of("", PROMPT, GREEDY)[0]
    sampling = dataclasses.replace(GREEDY, eos_token_ids=(eos,), min_tokens=2)
    (delta,) = await rig.run(PROMPT, sampling)
    assert delta.token_ids != (eos,)
    assert delta.finish_reason is None
    assert rig.sink.handles.open_handles == 1


@pytest.mark.parametrize("n", [1, 3])
async def test_resuming_sends_the_kv_whatever_comes_first(rig: PrefillRig, n: int) -> None:
    """The tokens exist already: the sampled one is thrown away, be it an end, and one pass is enough."""
    eos = tokens_of("", PROMPT, GREEDY)[0]
    sampling = dataclasses.replace(SAMPLED, eos_token_ids=(eos,), max_tokens=2, logit_bias={eos: 100.0})
    await rig.run(PROMPT, sampling, n=n, resume=True)
    assert [request.sampling for request in rig.engine.requests] == [ONE]
    for _ in range(n):
        assert (await rig.sink.received("h", "", PROMPT))[: -SEAL.size] == kv_of("", PROMPT)
    assert rig.sink.handles.open_handles == 0


async def test_sampling_reaches_the_engine_and_logprobs_come_back(rig: PrefillRig) -> None:
    sampling = dataclasses.replace(GREEDY, logprobs=2, logit_bias={3: 100.0}, presence_penalty=0.5, top_k=7)
    (delta,) = await rig.run(PROMPT, sampling)
    assert delta.token_ids == (3,)
    assert [len(entry.top) for entry in delta.logprobs] == [2]
    assert rig.engine.requests[0].sampling == sampling


@pytest.mark.parametrize("n", [1, 3])
async def test_the_prompts_log_probabilities_come_before_the_first_tokens(
    rig: PrefillRig, alice: AdapterRef, n: int
) -> None:
    """Once, from the pass that computes the prompt. A resumed request has them already."""
    sampling = dataclasses.replace(GREEDY, prompt_logprobs=2)
    events = [event async for event in rig.call(PROMPT, sampling, adapter=alice, n=n)]
    kinds = [event.WhichOneof("event") for event in events]
    assert kinds == ["prompt_logprobs", "first_tokens", "kv_pushed"]
    parts = PromptParts(2, len(PROMPT))
    parts.add(events[0].prompt_logprobs)
    assert parts.whole() == made_up(PROMPT, 2, alice.digest)
    await rig.run(PROMPT, sampling, adapter=alice, n=n, resume=True, handle="again")


async def test_an_adapter_is_checked_and_loaded_once(rig: PrefillRig, alice: AdapterRef, tmp_path: Path) -> None:
    bob = write_adapter(tmp_path / "bob", "bob's")
    users = (alice, bob, alice, alice, bob)
    await asyncio.gather(*(rig.run(PROMPT, ONE, adapter=user, to=None, handle=f"h{i}") for i, user in enumerate(users)))
    assert sorted(rig.engine.loaded) == sorted([alice.digest, bob.digest])
    await rig.run(PROMPT, ONE, adapter=alice, to=None)
    assert tuple(rig.adapters.states()) == (bob.digest, alice.digest)


async def test_adapters_that_left_memory_are_checked_and_loaded_again(tmp_path: Path) -> None:
    users = [write_adapter(tmp_path / f"user-{number}", str(number)) for number in range(3)]
    async with prefill_rig(host_bytes=1024) as rig:  # room for two
        for number in (0, 1, 0, 2):
            await rig.run(PROMPT, ONE, adapter=users[number], to=None)
        assert tuple(rig.adapters.states()) == (users[0].digest, users[2].digest)
        await rig.run(PROMPT, ONE, adapter=users[1], to=None)
        assert rig.engine.loaded == [users[number].digest for number in (0, 1, 2, 1)]


@pytest.mark.parametrize("to", [KvSink.address, None])
async def test_a_source_that_holds_something_else_is_refused(
    rig: PrefillRig, alice: AdapterRef, to: str | None
) -> None:
    """Weights that changed under a digest never meet a prompt."""
    write_adapter(Path(alice.source), "mallory's")
    with pytest.raises(grpc.aio.AioRpcError, match="no longer holds the version that was added") as raised:
        await rig.run(PROMPT, adapter=alice, to=to)
    assert raised.value.code() is grpc.StatusCode.UNAVAILABLE  # no fault of the request
    assert code_of(raised.value) == "adapter_unavailable"
    assert alice.source not in raised.value.details()
    assert (rig.engine.loaded, rig.engine.requests, tuple(rig.adapters.states())) == ([], [], ())
    write_adapter(Path(alice.source), "alice's")
    await rig.run(PROMPT, ONE, adapter=alice, to=None)  # repaired: nothing of the refusal is kept


async def test_a_source_that_is_gone(rig: PrefillRig, tmp_path: Path) -> None:
    adapter = AdapterRef("gone", "d" * 64, str(tmp_path / "gone"))
    await fails(rig.call(PROMPT, adapter=adapter), grpc.StatusCode.UNAVAILABLE, "adapter_unavailable", "gone")


async def test_an_adapter_that_the_engine_refuses(rig: PrefillRig, alice: AdapterRef) -> None:
    rig.engine.refused.add(alice.digest)
    await fails(rig.call(PROMPT, adapter=alice), grpc.StatusCode.UNAVAILABLE, "adapter_unavailable", "refuses it")
    rig.engine.die("killed")
    await fails(rig.call(PROMPT, adapter=alice), grpc.StatusCode.UNAVAILABLE, "worker_lost", "the engine died: killed")
    assert tuple(rig.adapters.states()) == ()


@pytest.mark.parametrize("prompt", [(), (1, 10_000), tuple(range(200))])
async def test_prompts_that_no_engine_takes(rig: PrefillRig, prompt: tuple[int, ...]) -> None:
    await fails(rig.call(prompt), grpc.StatusCode.INVALID_ARGUMENT, "invalid_request", "the engine refuses")


async def test_a_prompt_that_never_fits_into_staging_memory() -> None:
    async with prefill_rig() as rig:
        rig.engine.info = dataclasses.replace(rig.engine.info, block_bytes=ARENA_BYTES)
        await fails(rig.call(PROMPT), grpc.StatusCode.INVALID_ARGUMENT, "invalid_request", "staging memory")
        assert rig.engine.requests == []


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (EngineFailed("no reason"), grpc.StatusCode.INTERNAL, "engine_failed"),
        (WorkerLost("no reason"), grpc.StatusCode.UNAVAILABLE, "worker_lost"),
        (NumbersNotFinite("no reason"), grpc.StatusCode.INTERNAL, "numbers_not_finite"),
    ],
)
@pytest.mark.parametrize("index", [0, 2])
async def test_a_choice_that_the_engine_gives_up(
    rig: PrefillRig, error: PreftError, status: grpc.StatusCode, code: str, index: int
) -> None:
    rig.engine.failing = lambda request, made: error if request.index == index else None
    await fails(rig.call(PROMPT, SAMPLED, n=4), status, code, "no reason")
    assert rig.sink.handles.open_handles == 0


@pytest.mark.parametrize("before", [False, True])
async def test_kv_that_the_engine_did_not_write_is_never_sent(before: bool) -> None:
    """Also where an earlier prompt of the same size has left its KV, and its seal, in the staging memory."""
    async with prefill_rig(Forgetful) as rig:
        if before:
            region = await rig.arena.reserve(2 * rig.engine.info.block_bytes + SEAL.size, timeout=1)
            payload = rig.arena.view(region)
            await rig.sink.deliver("other", "", PROMPT)
            payload[:] = await rig.sink.received("other", "", PROMPT)
            assert read_seal(payload) == len(PROMPT)
            rig.arena.release(region)
        await fails(
            rig.call(PROMPT), grpc.StatusCode.DATA_LOSS, "kv_transfer_failed", "the engine didn't write", events=1
        )
        assert rig.sink.handles.open_handles == 0


async def test_a_receiver_that_refuses() -> None:
    async with prefill_rig(sink=KvSink(fingerprint="other")) as rig:
        await fails(
            rig.call(PROMPT), grpc.StatusCode.DATA_LOSS, "kv_transfer_failed", "the KV layouts differ", events=1
        )


async def test_nobody_to_send_to(rig: PrefillRig) -> None:
    await fails(
        rig.call(PROMPT, to="gone:1"), grpc.StatusCode.DATA_LOSS, "kv_transfer_failed", "nobody receives", events=1
    )


async def test_a_handle_that_was_given_up(rig: PrefillRig) -> None:
    rig.sink.handles.release("h")
    await fails(rig.call(PROMPT), grpc.StatusCode.DATA_LOSS, "kv_transfer_failed", "h was released", events=1)


async def test_a_receiver_that_never_answers_costs_no_more_than_the_call_s_time(rig: PrefillRig) -> None:
    full = await rig.sink.arena.reserve(ARENA_BYTES - HEADER_BYTES, timeout=1)
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await rig.run(PROMPT, timeout=0.3)
    assert raised.value.code() in (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.DATA_LOSS)
    rig.sink.arena.release(full)


async def test_cancelled_while_it_waits_for_staging_memory(rig: PrefillRig) -> None:
    full = await rig.arena.reserve(ARENA_BYTES - HEADER_BYTES, timeout=1)
    call = rig.call(PROMPT)
    await until(lambda: rig.service.usage.running == 1)
    await asyncio.sleep(0.02)
    call.cancel()
    await until(lambda: rig.service.usage.running == 0)
    rig.arena.release(full)
    assert rig.arena.used == 0
    assert rig.engine.requests == []


@pytest.mark.parametrize(("n", "running"), [(1, 1), (3, 2)])
async def test_cancelled_in_the_engine(rig: PrefillRig, n: int, running: int) -> None:
    """In the prompt pass, or when the further choices take their first tokens."""
    if n == 1:
        rig.engine.going.clear()
    else:
        rig.engine.failing = lambda request, made: rig.engine.going.clear()
    call = rig.call(PROMPT, SAMPLED, n=n)
    await until(lambda: rig.engine.stats.running == running and len(rig.engine.requests) == n)
    call.cancel()
    await until(lambda: rig.arena.used == 0 and rig.service.usage.running == 0)
    assert rig.engine.aborts == running
    assert (rig.engine.stats.running, rig.engine.stats.kv_usage) == (0, 0.0)


async def test_cancelled_while_the_kv_is_sent(rig: PrefillRig) -> None:
    full = await rig.sink.arena.reserve(ARENA_BYTES - HEADER_BYTES, timeout=1)
    call = rig.call(PROMPT)
    assert (await call.read()).HasField("first_tokens")
    await until(lambda: rig.sink.handles.open_handles == 1)
    call.cancel()
    await until(lambda: rig.arena.used == 0 and rig.sink.handles.open_handles == 0)
    rig.sink.arena.release(full)


async def test_many_cancelled_at_random_moments_leave_nothing(rig: PrefillRig, alice: AdapterRef) -> None:
    for step in range(60):
        call = rig.call(PROMPT, SAMPLED, adapter=alice, n=2, handle=f"h{step}")
        await asyncio.sleep(step * 2e-4)
        call.cancel()
        rig.sink.handles.release(f"h{step}")
    await until(lambda: rig.arena.used == 0 and rig.service.usage.running == 0 and rig.sink.arena.used == 0)
    assert rig.engine.stats.running == 0
    (delta,) = await rig.run(PROMPT, adapter=alice, handle="last")
    assert list(delta.token_ids) == tokens_of(alice.digest, PROMPT, GREEDY)[:1]


async def test_attempts_have_their_own_engine_requests(rig: PrefillRig) -> None:
    """A retry may come while the engine still winds the first attempt up."""
    for handle in ("a", "b"):
        await rig.run(PROMPT, handle=handle)
    assert len({request.request_id for request in rig.engine.requests}) == 2


async def test_no_call_outlives_its_client(rig: PrefillRig) -> None:
    rig.engine.going.clear()
    with suppress(grpc.aio.AioRpcError):
        await rig.run(PROMPT, timeout=0.1)
    await until(lambda: rig.service.usage.running == 0)
    assert rig.engine.aborts == 1


async def test_running_counts_calls(rig: PrefillRig) -> None:
    rig.engine.going.clear()
    calls = [rig.call(PROMPT, ONE, to=None) for _ in range(3)]
    await until(lambda: rig.service.usage.running == 3)
    rig.engine.going.set()
    for call in calls:
        assert [event async for event in call]
    await until(lambda: rig.service.usage.running == 0)


# Adapter slots, by caller


@pytest.mark.parametrize("to", [KvSink.address, None])
async def test_no_more_adapters_than_slots_and_no_memory_for_the_rest(
    alice: AdapterRef, tmp_path: Path, to: str | None
) -> None:
    """Also when several routers send them. Refused prompts don't even load their adapter."""
    bob = write_adapter(tmp_path / "bob", "bob's")
    async with prefill_rig(slots=1) as rig:
        rig.engine.going.clear()
        running = [rig.call(PROMPT, adapter=alice, handle=f"h{name}", to=to, caller=name) for name in ("one", "two")]
        await until(lambda: rig.engine.stats.running == 2)
        used = rig.arena.used
        for caller in ("one", "two", None):
            call = rig.call(PROMPT, adapter=bob, handle="hb", to=to, caller=caller)
            await fails(call, grpc.StatusCode.UNAVAILABLE, "worker_full", "all 1 adapter slots of the worker are taken")
        assert (rig.arena.used, rig.engine.loaded) == (used, [alice.digest])
        assert [rig.service.usage.other_prompts(name, alice.digest) for name in ("one", "three")] == [1, 2]
        base = rig.call(PROMPT, handle="base", to=to)
        await until(lambda: rig.engine.stats.running == 3)
        rig.engine.going.set()
        for call in (*running, base):
            assert [event async for event in call]
        await rig.run(PROMPT, ONE, adapter=bob, to=None)


async def test_the_slot_is_free_when_the_first_tokens_come(alice: AdapterRef, tmp_path: Path) -> None:
    bob = write_adapter(tmp_path / "bob", "bob's")
    async with prefill_rig(slots=1) as rig:
        full = await rig.sink.arena.reserve(ARENA_BYTES - HEADER_BYTES, timeout=1)
        call = rig.call(PROMPT, adapter=alice, caller="one")
        assert (await call.read()).HasField("first_tokens")
        assert list(rig.service.usage.prompted) == []
        assert rig.service.usage.other_work("two") == (0, 0)
        assert rig.service.usage.running == 1  # the KV isn't sent yet
        await rig.run(PROMPT, ONE, adapter=bob, to=None, caller="two")
        rig.sink.arena.release(full)
        assert (await call.read()).HasField("kv_pushed")
        await until(lambda: rig.service.usage.running == 0)
        await rig.sink.received("h", alice.digest, PROMPT)


@pytest.mark.parametrize("cause", ["cancelled", "failed", "refused"])
async def test_a_prompt_that_ends_early_leaves_its_slot(alice: AdapterRef, tmp_path: Path, cause: str) -> None:
    bob = write_adapter(tmp_path / "bob", "bob's")
    async with prefill_rig(slots=1) as rig:
        if cause == "cancelled":
            rig.engine.going.clear()
            call = rig.call(PROMPT, adapter=alice)
            await until(lambda: rig.engine.stats.running == 1)
            call.cancel()
            await until(lambda: rig.service.usage.running == 0)
            rig.engine.going.set()
        else:
            rig.engine.failing = lambda request, made: EngineFailed("no reason") if cause == "failed" else None
            prompt = PROMPT if cause == "failed" else ()
            await broken(rig.call(prompt, adapter=alice))
            rig.engine.failing = lambda request, made: None
        assert list(rig.service.usage.prompted) == []
        await rig.run(PROMPT, ONE, adapter=bob, to=None)


async def test_a_digest_that_is_none_is_never_counted(rig: PrefillRig, alice: AdapterRef) -> None:
    counted: list[str] = []
    rig.service.usage.observe(lambda digest, caller: counted.append(digest))
    odd = ReadableRef("alice", "../alice", alice.source)
    await fails(rig.call(PROMPT, adapter=odd), grpc.StatusCode.INVALID_ARGUMENT, "invalid_request", "64 lowercase")
    assert counted == []


async def test_a_caller_s_name_is_checked(rig: PrefillRig) -> None:
    says = "caller is at most 256 characters"
    await fails(rig.call(PROMPT, caller="x" * 257), grpc.StatusCode.INVALID_ARGUMENT, "invalid_request", says)
