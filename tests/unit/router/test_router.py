"""One router against fake workers over real gRPC: whatever happens, the caller sees the foretold tokens or one error,
and nothing is left running, reserved or held."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import random
import time
from collections import Counter
from collections.abc import AsyncIterable, AsyncIterator
from typing import Any

import pytest

from preft.core.cluster import AdapterState, WorkerState
from preft.core.errors import (
    AdapterUnavailable,
    DeadlineExceeded,
    EngineFailed,
    InvalidAdapter,
    InvalidRequest,
    ModelNotFound,
    NumbersNotFinite,
    PreftError,
    QueueFull,
    SourceNotFound,
    TransferFailed,
    Unavailable,
    WorkerLost,
)
from preft.core.request import GenerateRequest, TokenDelta
from preft.router.router import Router
from preft.router.worker_view import WorkerView
from preft.rpc import liveness
from support.fake_workers import EOS, FakeDecode, Fault, a_request, digest_of, foretold
from support.router_harness import FAST, SECRET, Harness, running
from support.silent_proxy import SilentProxy


@pytest.fixture
async def harness() -> AsyncIterator[Harness]:
    async with running(Harness()) as harness:
        yield harness


async def read_all(generation: AsyncIterable[TokenDelta], tokens: list[int]) -> None:
    """Of a request for one choice."""
    async for delta in generation:
        tokens += delta.token_ids


# Undisturbed


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("adapter", ["ada", None])
async def test_tokens_come_whole_and_in_order(harness: Harness, n: int, adapter: str | None) -> None:
    request = a_request(max_tokens=9, n=n, adapter=adapter)
    assert await harness.collect(request) == foretold(request)
    (prefill,) = harness.p.requests
    assert prefill.HasField("adapter") is (adapter is not None)
    assert (prefill.n, prefill.resume, prefill.target.address) == (n, False, harness.d.address)
    assert {decode.handle for decode in harness.d.messages} == {prefill.target.handle}
    assert harness.d.released == []
    assert harness.p.cancelled == harness.d.cancelled == 0


async def test_the_prompt_is_sent_once_for_all_choices(harness: Harness) -> None:
    """Once for prefill, once for decode: ten choices of a long prompt mustn't be ten prompts on the wire."""
    request = a_request(max_tokens=3, n=10, prompt=range(1500))
    assert await harness.collect(request) == foretold(request)
    (prefill,), (decode,) = harness.p.requests, harness.d.messages
    assert decode.prompt_token_ids == prefill.prompt_token_ids
    assert decode.ByteSize() < 1.2 * prefill.ByteSize()
    assert len(harness.d.choices) == 10


async def test_the_salt_reaches_both_workers_and_a_resumption(harness: Harness) -> None:
    request = dataclasses.replace(a_request(max_tokens=6), cache_salt="acme")
    harness.d.faults = [Fault(WorkerLost("gone"), after=2)]
    assert await harness.collect(request) == foretold(request)
    assert [prefill.cache_salt for prefill in harness.p.requests] == ["acme"] * 2
    assert [decode.cache_salt for decode in harness.d.messages] == ["acme"] * 2


async def test_many_requests_at_once(harness: Harness) -> None:
    await harness.second()
    requests = [a_request(2 + i % 7, n=1 + i % 3, prompt=range(i + 1), adapter=f"a{i % 5}") for i in range(60)]
    results = await asyncio.gather(*(harness.collect(request) for request in requests))
    assert results == [foretold(request) for request in requests]


async def test_a_long_burst_is_read_to_its_end_by_a_slow_reader(harness: Harness) -> None:
    request = a_request(max_tokens=3000)
    tokens: list[int] = []
    async with harness.router.generate(request) as generation:
        async for delta in generation:
            tokens += delta.token_ids
            if len(tokens) in (2, 500):
                await asyncio.sleep(0.2)
    assert tokens == foretold(request)[0]


async def test_the_first_token_doesnt_wait_for_the_kv(harness: Harness) -> None:
    harness.p.push_faults = [Fault()]  # the KV never comes
    async with harness.router.generate(a_request(n=2)) as generation, asyncio.timeout(10):
        stream = aiter(generation)
        assert {(await anext(stream)).index, (await anext(stream)).index} == {0, 1}


async def test_eos_as_first_token_never_touches_decode(harness: Harness) -> None:
    harness.cluster.ends = {0: 0}
    assert await harness.collect(a_request()) == {0: [EOS]}
    assert harness.d.messages == []
    assert harness.d.released == []
    assert harness.p.cancelled == 0


async def test_only_choices_that_go_on_are_decoded(harness: Harness) -> None:
    harness.cluster.ends = {1: 0, 2: 3}
    request = a_request(n=3)
    assert await harness.collect(request) == foretold(request, harness.cluster.ends)
    assert sorted(choice.index for choice in harness.d.choices) == [0, 2]


async def test_one_token_needs_no_decode_worker(harness: Harness) -> None:
    request = a_request(max_tokens=1, n=2)
    assert await harness.collect(request) == foretold(request)
    assert not harness.p.requests[0].HasField("target")
    assert harness.d.messages == []


async def test_calls_end_by_themselves_though_the_caller_left_at_the_last_token(harness: Harness) -> None:
    harness.p.linger = harness.d.linger = 0.1
    async with harness.router.generate(a_request(max_tokens=3)) as generation:
        async for delta in generation:
            if delta.finish_reason is not None:
                break
    gc.collect()  # gRPC cancels a call that is dropped
    await harness.clean()
    assert harness.d.cancelled == harness.p.cancelled == 0
    assert harness.d.released == []


# Faults before the first token


@pytest.mark.parametrize("error", [EngineFailed("out of memory"), Unavailable("draining"), TransferFailed("no room")])
async def test_another_worker_is_tried_before_the_first_token(harness: Harness, error: PreftError) -> None:
    p1, _ = await harness.second()
    harness.p.faults = [Fault(error)]
    for i in range(10):  # until affinity sends one to the failing worker
        request = a_request(adapter=f"a{i}")
        assert await harness.collect(request) == foretold(request)
    assert harness.p.faults == []
    assert harness.router.stats().retries == 1
    assert harness.p.requests[0].adapter in [prefill.adapter for prefill in p1.requests]
    assert not any(prefill.resume for prefill in p1.requests)
    assert harness.p.requests[0].target.handle in harness.cluster.released


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (InvalidRequest("too long", param="prompt"), InvalidRequest),
        (ModelNotFound("no such adapter"), ModelNotFound),
        (NumbersNotFinite("overflow"), NumbersNotFinite),
    ],
)
async def test_what_every_worker_would_refuse_is_not_retried(
    harness: Harness, error: PreftError, expected: type[PreftError]
) -> None:
    harness.p.faults = [Fault(error)]
    with pytest.raises(expected, match=str(error)):
        await harness.collect(a_request())
    assert harness.p.calls == 1


async def test_numbers_that_overflow_after_the_first_token_are_not_resumed(harness: Harness) -> None:
    harness.d.faults = [Fault(NumbersNotFinite("overflow"), 2)]
    with pytest.raises(NumbersNotFinite, match="overflow"):
        await harness.collect(a_request())
    assert (harness.p.calls, harness.d.calls) == (1, 1)


async def test_the_last_error_is_raised_when_retries_are_used_up(harness: Harness) -> None:
    harness.p.faults = [Fault(EngineFailed(f"failure {i}")) for i in range(9)]
    with pytest.raises(EngineFailed, match="failure 2"):
        await harness.collect(a_request())
    assert harness.p.calls == 3


async def test_an_only_worker_is_tried_again(harness: Harness) -> None:
    harness.p.faults = [Fault(EngineFailed("hiccup"))]
    request = a_request()
    assert await harness.collect(request) == foretold(request)


async def test_a_broken_call_while_the_store_is_away_condemns_no_other_worker() -> None:
    async with running(Harness(), worker_timeout=0.3) as harness:
        await harness.second()
        workers = harness.cluster.workers

        async def away() -> Any:
            raise Unavailable("disk I/O error")

        harness.cluster.workers = away  # type: ignore[method-assign]
        await asyncio.sleep(0.5)
        await harness.p.die()
        for seed in range(4):
            request = a_request(adapter=None, prompt=range(seed + 3))
            assert await harness.collect(request) == foretold(request)
        states = {key: worker.state for key, worker in harness.router.view.workers.items()}
        assert [key for key, state in states.items() if state is WorkerState.DEAD] == ["p0"]
        harness.cluster.workers = workers  # type: ignore[method-assign]


async def test_a_dead_prefill_worker_is_left_alone(harness: Harness) -> None:
    p1, _ = await harness.second()
    await harness.p.die()
    for seed in range(8):  # whatever the affinity says
        request = a_request(adapter=f"a{seed}")
        assert await harness.collect(request) == foretold(request)
    assert p1.calls == 8


# Faults after the first token


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("after", [0, 1, 3])
async def test_a_stream_survives_the_death_of_its_decode_worker(harness: Harness, n: int, after: int) -> None:
    p1, d1 = await harness.second()
    harness.d.delay = d1.delay = 0.01
    request = a_request(max_tokens=12, n=n)
    streams: dict[int, list[int]] = {index: [] for index in range(n)}
    dead: FakeDecode | None = None
    async with harness.router.generate(request) as generation:
        async for delta in generation:
            streams[delta.index] += delta.token_ids
            if dead is None and min(map(len, streams.values())) > after:
                if after:  # with the first token alone, the KV isn't there yet
                    await harness.seen(lambda: harness.d.running + d1.running == n)
                target = (harness.p.requests + p1.requests)[-1].target.address
                dead, alive = (harness.d, d1) if target == harness.d.address else (d1, harness.d)
                await dead.die()
    assert streams == foretold(request)
    assert dead is not None
    resumed = [prefill for prefill in harness.p.requests + p1.requests if prefill.resume]
    assert [prefill.n for prefill in resumed] == [n]  # one prefill for all choices
    assert resumed[0].adapter.digest == digest_of("ada")
    assert {decode.handle for decode in alive.messages} == {resumed[0].target.handle}
    assert resumed[0].target.handle not in {decode.handle for decode in dead.messages}
    assert all(len(choice.output_token_ids) > after for choice in alive.choices)
    assert harness.router.stats().resumes >= 1


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_a_worker_that_is_gone_without_a_word_is_noticed(
    harness: Harness, role: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its machine has lost power or its process is frozen: connections stay open, and nothing comes."""
    monkeypatch.setattr(liveness, "PING_SECONDS", 0.5)
    monkeypatch.setattr(liveness, "PING_TIMEOUT_SECONDS", 0.5)
    silent = harness.p if role == "prefill" else harness.d
    async with SilentProxy(silent.address) as proxy:
        silent.address = proxy.address
        silent.delay = 0.3
        await harness.known()
        request = a_request(max_tokens=8)
        tokens: list[int] = []
        async with asyncio.timeout(20), harness.router.generate(request) as generation:
            reading = asyncio.create_task(read_all(generation, tokens))
            await harness.seen(lambda: silent.running if role == "prefill" else len(tokens) > 3)
            before = list(tokens)
            proxy.fall_silent()
            p1, d1 = await harness.second()
            await reading
        assert len(before) < 8
        assert tokens == foretold(request)[0]
        assert (p1 if role == "prefill" else d1).calls == 1
        await silent.die()


async def test_a_healthy_choice_goes_on_while_another_is_resumed(harness: Harness) -> None:
    harness.d.delay = 0.02
    harness.d.choice_faults = {1: [Fault(TransferFailed("evicted"), after=2)]}
    request = a_request(max_tokens=25, n=3)
    assert await harness.collect(request) == foretold(request)
    first, again = harness.p.requests
    assert (again.resume, again.n) == (True, 1)
    by_handle = {handle: [c.index for d in harness.d.messages if d.handle == handle for c in d.choices] for handle in
                 (first.target.handle, again.target.handle)}  # fmt: skip
    assert sorted(by_handle[first.target.handle]) == [0, 1, 2]
    assert by_handle[again.target.handle] == [1]
    (resumed,) = (d for d in harness.d.messages if d.handle == again.target.handle)
    assert list(resumed.choices[0].output_token_ids) == foretold(request)[1][:3]
    assert harness.d.cancelled == 1  # the failed call itself


async def test_progress_renews_the_retries(harness: Harness) -> None:
    """Evicted after every second token, far more often than `retries`: it still gets there."""
    harness.d.faults = [Fault(TransferFailed("evicted"), after=2) for _ in range(20)]
    request = a_request(max_tokens=24)
    assert await harness.collect(request) == foretold(request)
    assert harness.router.stats().resumes == 11


async def test_no_progress_uses_them_up(harness: Harness) -> None:
    harness.d.faults = [Fault(TransferFailed("evicted"), after=0) for _ in range(20)]
    with pytest.raises(TransferFailed, match="evicted"):
        await harness.collect(a_request(n=2))
    assert harness.d.calls <= 6


async def test_a_stale_handle_is_resumed_with_a_new_one(harness: Harness) -> None:
    harness.p.push_faults = []
    harness.d.faults = [Fault(TransferFailed("unknown handle"))]
    request = a_request()
    assert await harness.collect(request) == foretold(request)
    handles = [decode.handle for decode in harness.d.messages]
    assert len(set(handles)) == 2


@pytest.mark.parametrize("fault", [Fault(TransferFailed("checksum")), Fault(WorkerLost("can't reach decode"))])
async def test_a_failed_push_is_repeated(harness: Harness, fault: Fault) -> None:
    harness.p.push_faults = [fault]
    request = a_request(n=2)
    assert await harness.collect(request) == foretold(request)
    assert [prefill.resume for prefill in harness.p.requests] == [False, True]
    assert len(harness.d.released) == 1


async def test_a_push_that_never_happened_is_an_error(harness: Harness) -> None:
    harness.p.pushes = False
    with pytest.raises(TransferFailed, match="ended without having sent the KV cache"):
        await harness.collect(a_request())
    assert len(harness.p.requests) == 3


async def test_a_slow_push_times_out() -> None:
    async with running(Harness(), transfer_timeout=0.1, retries=0) as harness:
        harness.p.push_faults = [Fault()]
        with pytest.raises(TransferFailed, match=r"within 0\.1 s"):
            await harness.collect(a_request())
        await harness.clean()
        assert harness.p.cancelled == 1


async def test_a_restarting_decode_worker_is_waited_for(harness: Harness) -> None:
    harness.d.delay = 0.01
    request = a_request(max_tokens=12)
    tokens: list[int] = []
    async with harness.router.generate(request) as generation:
        async for delta in generation:
            tokens += delta.token_ids
            if len(tokens) == 4:
                await harness.d.die()
                asyncio.get_running_loop().call_later(
                    0.15, lambda: setattr(harness, "task", asyncio.create_task(harness.cluster.add_decode("d0")))
                )
    assert tokens == foretold(request)[0]


async def test_a_decode_worker_that_never_comes_back_is_an_error(harness: Harness) -> None:
    harness.d.delay = 0.01
    asyncio.get_running_loop().call_later(0.05, lambda: setattr(harness, "task", asyncio.create_task(harness.d.die())))
    with pytest.raises(Unavailable, match="no prefill and decode workers"):
        await harness.collect(a_request(max_tokens=50))


# Leaving early


async def leave_when_queued(harness: Harness, generation: Any) -> None:
    assert harness.router.stats().waiting == 1


async def leave_in_prefill(harness: Harness, generation: Any) -> None:
    harness.p.faults = [Fault()]
    reading = asyncio.create_task(anext(aiter(generation)))
    await harness.seen(lambda: harness.p.running)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading


async def leave_unread(harness: Harness, generation: Any) -> None:
    pass


async def leave_after_first_token(harness: Harness, generation: Any) -> None:
    await anext(aiter(generation))


async def leave_in_transfer(harness: Harness, generation: Any) -> None:
    harness.p.push_faults = [Fault()]
    stream = aiter(generation)
    for _ in range(3):
        await anext(stream)
    reading = asyncio.create_task(anext(stream))
    await asyncio.sleep(0.05)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading


async def leave_in_decode(harness: Harness, generation: Any) -> None:
    harness.d.delay = 0.01
    stream = aiter(generation)
    for _ in range(9):
        await anext(stream)
    assert harness.d.running == 3


async def leave_in_resumption(harness: Harness, generation: Any) -> None:
    harness.d.faults = [Fault(TransferFailed("evicted"), after=1) for _ in range(3)]
    harness.p.faults = [None, Fault()]
    stream = aiter(generation)
    for _ in range(6):
        await anext(stream)
    reading = asyncio.create_task(anext(stream))
    await harness.seen(lambda: len(harness.p.requests) == 2)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading


@pytest.mark.parametrize(
    "leave",
    [
        leave_unread,
        leave_in_prefill,
        leave_after_first_token,
        leave_in_transfer,
        leave_in_decode,
        leave_in_resumption,
    ],
)
async def test_leaving_cancels_everything(harness: Harness, leave: Any) -> None:
    async with harness.router.generate(a_request(max_tokens=2000, n=3)) as generation:
        await leave(harness, generation)
    assert harness.idle  # at once
    await harness.clean()
    await harness.seen(lambda: all(sent.target.handle in harness.d.released for sent in harness.p.requests[-1:]))
    request = a_request()
    assert await harness.collect(request) == foretold(request)


async def test_a_cancelled_caller_leaves_nothing(harness: Harness) -> None:
    """Fifty requests, each cancelled at another moment of its life."""
    harness.p.delay, harness.d.delay = 0.01, 0.002

    async def cancelled_after(seconds: float, n: int) -> None:
        task = asyncio.create_task(harness.collect(a_request(max_tokens=40, n=n)))
        await asyncio.sleep(seconds)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    await asyncio.gather(*(cancelled_after(i * 0.003, 1 + i % 3) for i in range(50)))
    await harness.clean()


async def test_leaving_the_queue(harness: Harness) -> None:
    async with harness.router.generate(a_request(prompt=range(15_000))):
        with pytest.raises(InvalidRequest):
            async with harness.router.generate(a_request(prompt=range(16_000))):
                pass
        async with harness.router.generate(a_request(prompt=range(15_000))) as waiting:
            assert harness.router.stats().waiting == 1
            reading = asyncio.create_task(anext(aiter(waiting)))
            await asyncio.sleep(0.05)
            assert not reading.done()
        assert harness.router.stats().waiting == 0
        with pytest.raises(StopAsyncIteration):
            await reading


# Adapters that come in


def a_prefetched(harness: Harness) -> list[str]:
    workers = [worker for worker in harness.cluster.members.values() if worker.prefetched]
    return [digest for worker in workers for digest in worker.prefetched]


def watch_slots(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """The most adapters that prompts have used at once, per worker, from now on."""
    most = dict[str, int]()
    add = WorkerView.add_prefill

    def added(view: WorkerView, digest: str, work: int = 1) -> None:
        add(view, digest, work)
        most[view.id] = max(most.get(view.id, 0), view.slots_used)

    monkeypatch.setattr(WorkerView, "add_prefill", added)
    return most


async def test_a_load_delays_nobody_else() -> None:
    """One prefill place, one slot, decode room for one: the cold adapter's requests hold none of them."""
    async with running(Harness(), max_inflight_prefills=1) as harness:
        harness.p.adapter_slots, harness.p.load_seconds = 1, 1.0
        harness.d.kv_blocks_total = 6
        await harness.known()
        await harness.known()
        cold = [asyncio.create_task(harness.collect(a_request(n=1, adapter="new"))) for _ in range(4)]
        await harness.seen(lambda: harness.p.prefetched)
        assert harness.idle
        started = time.monotonic()
        for adapter in ("ada", None, "bob", "ada") * 3:
            await harness.collect(a_request(adapter=adapter))
        assert time.monotonic() - started < 0.9
        assert not any(task.done() for task in cold)
        assert await asyncio.gather(*cold) == [foretold(a_request(adapter="new"))] * 4
        assert harness.p.prefetched == [digest_of("new")]
        assert harness.p.cold == []


async def test_one_load_however_many_wait(harness: Harness) -> None:
    p1, _ = await harness.second()
    harness.p.load_seconds = p1.load_seconds = 0.2
    requests = [a_request(adapter=f"new{i % 3}", n=1 + i % 3, prompt=range(i + 1)) for i in range(30)]
    results = await asyncio.gather(*(harness.collect(request) for request in requests))
    assert results == [foretold(request) for request in requests]
    for worker in (harness.p, p1):
        assert len(worker.prefetched) == len(set(worker.prefetched))
        assert worker.cold == []
    assert set(a_prefetched(harness)) == {digest_of(f"new{i}") for i in range(3)}


@pytest.mark.parametrize("error", [InvalidAdapter("broken"), SourceNotFound("nothing there"), Unavailable("no room")])
async def test_a_refused_load_is_the_answer(harness: Harness, error: PreftError) -> None:
    harness.p.load_seconds = 0.2
    harness.p.load_faults = [None, Fault(error)]
    other = asyncio.create_task(harness.collect(a_request(adapter="other")))
    await harness.seen(lambda: harness.p.prefetched)
    cold = [asyncio.create_task(harness.collect(a_request(adapter="new"))) for _ in range(3)]
    for task in cold:
        with pytest.raises(type(error), match=str(error)):
            await task
    assert not other.done()
    assert await other == foretold(a_request(adapter="other"))
    assert harness.p.calls == 1
    assert await harness.collect(a_request(adapter="new")) == foretold(a_request(adapter="new"))
    assert sorted(harness.p.prefetched) == [digest_of("new"), digest_of("new"), digest_of("other")]


async def test_a_worker_is_lost_while_it_loads(harness: Harness) -> None:
    p1, _ = await harness.second()
    harness.p.load_faults, p1.load_faults = [Fault()], [Fault()]
    cold = [asyncio.create_task(harness.collect(a_request(adapter="new", n=2))) for _ in range(5)]
    await harness.seen(lambda: harness.p.prefetched or p1.prefetched)
    lost, other = (harness.p, p1) if harness.p.prefetched else (p1, harness.p)
    other.load_faults = []
    await lost.die()
    assert await asyncio.gather(*cold) == [foretold(a_request(adapter="new", n=2))] * 5
    assert (lost.prefetched, other.prefetched) == ([digest_of("new")], [digest_of("new")])
    assert harness.router.stats().retries == 0


async def test_the_only_worker_restarts_while_it_loads(harness: Harness) -> None:
    harness.p.load_faults = [Fault()]
    cold = asyncio.create_task(harness.collect(a_request(adapter="new")))
    await harness.seen(lambda: harness.p.prefetched)
    await harness.p.die()
    await asyncio.sleep(0.05)
    await harness.p.start()
    harness.p.silent_since = None
    assert await cold == foretold(a_request(adapter="new"))
    assert harness.p.prefetched == [digest_of("new")] * 2


async def test_a_restarted_worker_is_asked_again(harness: Harness) -> None:
    for _ in range(2):
        await harness.collect(a_request(adapter="new"))
    assert harness.p.prefetched == [digest_of("new")]
    await harness.p.die()
    await harness.p.start()
    harness.p.silent_since = None
    await harness.seen(lambda: harness.router.view.workers["p0"].is_ready)
    assert await harness.collect(a_request(adapter="new")) == foretold(a_request(adapter="new"))
    assert harness.p.prefetched == [digest_of("new")] * 2
    assert harness.p.cold == []


async def test_a_status_that_never_names_the_adapter_stops_nobody(harness: Harness) -> None:
    harness.p.lists_adapters = False
    await harness.seen(lambda: not harness.router.view.workers["p0"].adapters)
    for _ in range(3):
        for _ in range(3):
            assert await harness.collect(a_request(adapter="new")) == foretold(a_request(adapter="new"))
        await asyncio.sleep(0.2)
    assert 1 <= len(harness.p.prefetched) <= 9


async def test_leaving_while_the_adapter_comes(harness: Harness) -> None:
    """By cancellation, by a deadline, by stopping: the load goes on, and the next request finds the adapter."""
    harness.p.load_seconds = 0.4
    task = asyncio.create_task(harness.collect(a_request(adapter="new")))
    with pytest.raises(DeadlineExceeded, match="while it waited"):
        await harness.collect(a_request(adapter="new", deadline=time.time() + 0.05))
    task.cancel()
    async with harness.router.generate(a_request(adapter="new")) as waiting:
        asyncio.get_running_loop().call_later(0.05, waiting.stop, 0)
        assert [delta async for delta in waiting] == []
    await asyncio.gather(task, return_exceptions=True)
    assert harness.router.stats().waiting == 0
    await harness.clean()
    await harness.seen(lambda: digest_of("new") in harness.p.adapters)
    assert await harness.collect(a_request(adapter="new")) == foretold(a_request(adapter="new"))
    assert harness.p.prefetched == [digest_of("new")]


async def test_closing_ends_loads_and_who_waits_for_them() -> None:
    harness = Harness()
    await harness.start(FAST)
    harness.p.load_faults = [Fault()]
    cold = asyncio.create_task(harness.collect(a_request(adapter="new")))
    await harness.seen(lambda: harness.p.prefetched)
    await asyncio.wait_for(harness.router.close(), 5)
    with pytest.raises(Unavailable, match="shutting down"):
        await cold
    await harness.cluster.stop()


async def test_a_slot_is_free_before_the_kv_is_sent(harness: Harness) -> None:
    harness.p.adapter_slots = 1
    await harness.known()
    harness.p.push_faults = [Fault()]
    async with harness.router.generate(a_request(adapter="ada")) as first, asyncio.timeout(10):
        await anext(aiter(first))  # its KV never comes
        assert await harness.collect(a_request(adapter="bob")) == foretold(a_request(adapter="bob"))


async def test_a_workers_slots_are_never_overrun(harness: Harness) -> None:
    p1, _ = await harness.second()
    for worker in (harness.p, p1):
        worker.adapter_slots, worker.delay, worker.linger = 2, 0.02, 0.02
    await harness.known()
    requests = [a_request(2 + i % 3, n=1 + i % 2, prompt=range(i + 1), adapter=f"a{i * 7 % 9}") for i in range(90)]
    requests += [a_request(adapter=None) for _ in range(10)]
    results = await asyncio.gather(*(harness.collect(request) for request in requests))
    assert results == [foretold(request) for request in requests]
    assert harness.p.most_adapters == p1.most_adapters == 2
    assert harness.p.cold == p1.cold == []


async def test_a_new_adapter_isnt_starved_by_a_busy_one(harness: Harness) -> None:
    harness.p.adapter_slots, harness.p.delay = 1, 0.05
    await harness.known()
    over = False

    async def busy(first: float) -> None:
        await asyncio.sleep(first)
        while not over:
            await harness.collect(a_request(max_tokens=2))

    senders = [asyncio.create_task(busy(i * 0.013)) for i in range(8)]
    await harness.seen(lambda: harness.p.calls >= 8)
    started = time.monotonic()
    await harness.collect(a_request(adapter="bob"))
    assert time.monotonic() - started < 1.0
    over = True
    await asyncio.gather(*senders)


async def test_a_busy_holder_is_joined_by_another(harness: Harness) -> None:
    p1, _ = await harness.second()
    harness.p.adapters = (digest_of("ada"),)
    await harness.seen(lambda: harness.router.view.workers["p0"].holds(digest_of("ada")))
    harness.p.delay = p1.delay = 0.1
    await asyncio.gather(*(harness.collect(a_request()) for _ in range(40)))
    assert (harness.p.prefetched, p1.prefetched) == ([], [digest_of("ada")])
    assert p1.calls > 4
    assert p1.cold == []


async def test_where_an_adapter_is(harness: Harness) -> None:
    """On every ready worker that has told so, whether the worker prefills alone or decodes too."""
    await harness.second()
    await harness.cluster.add_colocated("c0", adapters=(digest_of("ada"),))
    await harness.cluster.add_prefill("draining", state=WorkerState.DRAINING, adapters=(digest_of("ada"),))
    await harness.known()
    places = {place.worker_id: place.state for place in harness.router.places(digest_of("ada"))}
    assert places == {"p0": AdapterState.HOST, "c0": AdapterState.HOST}


# All of it at once


@pytest.mark.parametrize("seed", range(3))
async def test_a_storm(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two hundred requests on three pairs, with failures of every kind, workers that die and come back without their
    adapters, adapters that must be loaded and can't always, few slots, callers that leave: whatever is finished is
    exact, whatever fails fails with an error of ours, and nothing is left behind."""
    draw = random.Random(seed)
    errors = (EngineFailed("engine"), TransferFailed("evicted"), Unavailable("busy"), WorkerLost("peer"))
    outcomes: Counter[str] = Counter()

    def some_faults(share: float, after: int) -> list[Fault | None]:
        return [
            Fault(draw.choice(errors), draw.randrange(after)) if draw.random() < share else None for _ in range(400)
        ]

    async with running(Harness(), retries=3, restart_grace=5.0, transfer_timeout=5.0) as harness:
        pairs = [(harness.p, harness.d)]
        pairs += [
            (await harness.cluster.add_prefill(f"p{i}"), await harness.cluster.add_decode(f"d{i}")) for i in (1, 2)
        ]
        harness.cluster.ends = {0: 9, 2: 0}
        for prefill, decode in pairs:
            prefill.faults, prefill.push_faults, decode.faults = (some_faults(0.1, n) for n in (1, 1, 6))
            prefill.delay, decode.delay = 0.005, 0.002
            prefill.load_faults = [Fault(InvalidAdapter("broken")) if draw.random() < 0.02 else None for _ in range(99)]
            prefill.load_seconds, prefill.adapter_slots = 0.03, 2
        await harness.known()
        most = watch_slots(monkeypatch)

        async def one(number: int) -> None:
            await asyncio.sleep(draw.random())
            request = a_request(draw.randint(1, 20), n=draw.randint(1, 3), prompt=range(draw.randint(1, 70)),
                                adapter=draw.choice(["ada", "bob", "cyd", "dan", "eve", None]))  # fmt: skip
            task = asyncio.create_task(harness.collect(request))
            if number % 4 == 0:
                asyncio.get_running_loop().call_later(draw.random() * 0.3, task.cancel)
            try:
                assert await task == foretold(request, harness.cluster.ends)
                outcomes["finished"] += 1
            except PreftError:
                outcomes["failed"] += 1
            except asyncio.CancelledError:
                outcomes["left"] += 1

        async def kill_and_restart() -> None:
            for victim in (pairs[0][1], pairs[1][0]):
                await asyncio.sleep(0.4)
                await victim.die()
                await asyncio.sleep(0.2)
                await victim.start()
                victim.silent_since = None

        await asyncio.gather(kill_and_restart(), *(one(number) for number in range(200)))
        assert sum(outcomes.values()) == 200
        assert outcomes["finished"] >= 120
        assert outcomes["failed"] <= 25
        assert sum(len(prefill.prefetched) for prefill, _ in pairs) >= 5
        assert max(most.values()) == 2
        assert harness.router.stats().retries >= 5
        assert harness.router.stats().resumes >= 5


# Stopping a choice


async def test_stopping_the_only_choice_ends_the_iteration(harness: Harness) -> None:
    harness.d.delay = 0.01
    tokens: list[int] = []
    request = a_request(max_tokens=2000)
    async with harness.router.generate(request) as generation:
        async for delta in generation:
            tokens += delta.token_ids
            if len(tokens) == 4:
                generation.stop(0)
                assert harness.idle
    assert tokens == [*foretold(a_request(max_tokens=2000))[0][:4]]
    await harness.clean()
    assert harness.d.cancelled == 1


async def test_stopping_at_the_first_token_starts_no_decode(harness: Harness) -> None:
    harness.p.push_faults = [Fault(seconds=0.1)]
    async with harness.router.generate(a_request()) as generation:
        async for _ in generation:
            generation.stop(0)
    await harness.clean()
    assert harness.d.messages == []
    await harness.seen(lambda: harness.d.released == [harness.p.requests[0].target.handle])


async def test_stopping_one_choice_leaves_the_others(harness: Harness) -> None:
    harness.d.delay = 0.005
    request = a_request(max_tokens=20, n=3)
    streams: dict[int, list[int]] = {0: [], 1: [], 2: []}
    async with harness.router.generate(request) as generation:
        async for delta in generation:
            streams[delta.index] += delta.token_ids
            if delta.index == 0 and len(streams[0]) == 1:
                generation.stop(0)  # not decoded yet
            if delta.index == 2 and len(streams[2]) == 5:
                generation.stop(2)
    expected = foretold(request)
    assert streams[0] == expected[0][:1]
    assert streams[1] == expected[1]
    assert streams[2] == expected[2][: len(streams[2])]
    assert 5 <= len(streams[2]) <= 7  # tokens that were on their way
    await harness.clean()
    assert sorted(choice.index for choice in harness.d.choices) == [1, 2]
    assert harness.d.released == [harness.p.requests[0].target.handle]


async def test_a_stopped_choice_is_cancelled_at_once_though_others_go_on(harness: Harness) -> None:
    harness.d.delay = 0.01
    request = a_request(max_tokens=60, n=2)
    async with harness.router.generate(request) as generation:
        seen: Counter[int] = Counter()
        async for delta in generation:
            seen[delta.index] += len(delta.token_ids)
            if seen[0] == 3 and delta.index == 0:
                generation.stop(0)
            if seen[1] == 40:
                assert (harness.d.running, harness.d.cancelled) == (1, 1)
    assert seen[1] == 60


async def test_stopping_from_another_task_wakes_the_reader(harness: Harness) -> None:
    harness.d.faults = [Fault(after=2)]
    async with harness.router.generate(a_request()) as generation:
        tokens: list[int] = []

        async def read() -> None:
            async for delta in generation:
                tokens.extend(delta.token_ids)

        reading = asyncio.create_task(read())
        await harness.seen(lambda: len(tokens) == 3)
        generation.stop(0)
        await reading
        assert tokens == foretold(a_request())[0][:3]


async def test_stopping_while_it_waits_in_the_queue(harness: Harness) -> None:
    async with (
        harness.router.generate(a_request(prompt=range(15_000))),
        harness.router.generate(a_request(prompt=range(15_000))) as waiting,
    ):
        asyncio.get_running_loop().call_later(0.05, waiting.stop, 0)
        assert [delta async for delta in waiting] == []
        assert harness.router.stats().waiting == 0


# Admission


async def test_a_full_queue_turns_requests_away() -> None:
    async with (
        running(Harness(), max_queue=1, max_inflight_prefills=1) as harness,
        harness.router.generate(a_request()),
        harness.router.generate(a_request(adapter="bob")),
    ):
        with pytest.raises(QueueFull, match="1 requests are waiting") as caught:
            async with harness.router.generate(a_request(adapter="cyd")):
                pass
        assert caught.value.retry_after >= 1
        assert harness.router.stats().waiting == 1


async def test_a_deadline_passes_in_the_queue(harness: Harness) -> None:
    async with harness.router.generate(a_request(prompt=range(15_000))):
        with pytest.raises(DeadlineExceeded, match="while it waited"):
            await harness.collect(a_request(prompt=range(15_000), deadline=time.time() + 0.1))
        assert harness.router.stats().waiting == 0


async def test_a_deadline_passes_in_prefill(harness: Harness) -> None:
    harness.p.faults = [Fault()]
    with pytest.raises(DeadlineExceeded, match="time limit"):
        await harness.collect(a_request(deadline=time.time() + 0.1))
    assert harness.p.calls == 1


async def test_a_deadline_passes_in_decode(harness: Harness) -> None:
    harness.d.faults = [Fault(after=3)] * 2
    with pytest.raises(DeadlineExceeded, match="time limit"):
        await harness.collect(a_request(n=2, deadline=time.time() + 0.6))
    assert harness.d.calls == 2


async def test_a_deadline_in_the_past_is_refused_at_once(harness: Harness) -> None:
    with pytest.raises(DeadlineExceeded):
        async with harness.router.generate(a_request(deadline=time.time() - 1)):
            pass
    assert harness.p.calls == 0


async def test_an_adapter_stays_with_its_worker(harness: Harness) -> None:
    p1, _ = await harness.second()
    for adapter in ("ada", "bob", "cyd", "dan", "eve", "flo"):
        for _ in range(2):
            await harness.collect(a_request(adapter=adapter))
    homes = [{request.adapter.digest for request in worker.requests} for worker in (harness.p, p1)]
    assert not homes[0] & homes[1]
    assert homes[0]
    assert homes[1]


async def test_a_resident_adapter_attracts(harness: Harness) -> None:
    p1, _ = await harness.second()
    for worker, other in ((harness.p, p1), (p1, harness.p)):
        worker.adapters, other.adapters = (digest_of("ada"),), ()
        await harness.seen(lambda w=worker: set(harness.router.view.holders.get(digest_of("ada"), ())) == {w.id})
        before = worker.calls
        await harness.collect(a_request())
        assert worker.calls == before + 1


async def test_a_busy_home_is_left(harness: Harness) -> None:
    p1, _ = await harness.second()
    harness.p.delay = p1.delay = 0.1
    await asyncio.gather(*(harness.collect(a_request()) for _ in range(40)))
    assert harness.p.calls > 4
    assert p1.calls > 4


async def test_only_fitting_workers_are_paired() -> None:
    async with running(Harness(), restart_grace=30.0) as harness:
        harness.d.state = WorkerState.DRAINING
        await harness.cluster.add_decode("d1", fingerprint="other model")
        await harness.seen(lambda: not harness.router.ready())
        waiting = asyncio.create_task(harness.collect(a_request()))
        await asyncio.sleep(0.2)
        assert not waiting.done()
        assert harness.p.calls == 0
        p1 = await harness.cluster.add_prefill("p1", fingerprint="other model")
        await waiting
        assert p1.calls == 1
        for i in range(5):
            await harness.collect(a_request(adapter=f"a{i}"))
        assert p1.calls == 6


async def test_workers_of_another_cluster_are_not_ours(harness: Harness) -> None:
    router = Router(harness.cluster, FAST, SECRET, cluster_id="c1")  # type: ignore[arg-type]
    await router.start()
    assert not router.ready()
    await harness.cluster.add_prefill("c1-prefill-0")
    await harness.cluster.add_decode("c1-decode-0")
    await harness.seen(router.ready)
    assert sorted(router.view.workers) == ["c1-decode-0", "c1-prefill-0"]
    await router.close()


async def test_a_silent_worker_takes_nothing() -> None:
    async with running(Harness(), worker_timeout=0.2) as harness:
        assert harness.router.ready()
        harness.d.silent_since = time.time()
        await harness.seen(lambda: not harness.router.ready())
        assert harness.router.view.workers["d0"].state is WorkerState.DEAD
        harness.d.silent_since = None
        await harness.seen(harness.router.ready)


async def test_new_requests_go_past_stalled_workers(harness: Harness) -> None:
    p1, d1 = await harness.second()
    harness.p.tell(stalled_seconds=5)
    d1.tell(stalled_seconds=9)
    await harness.seen(lambda: harness.router.view.stalled == {"p0", "d1"})
    for adapter in ("ada", "bob", "new", None):  # p0 has the first two
        request = a_request(adapter=adapter)
        assert await harness.collect(request) == foretold(request)
    assert (harness.p.calls, p1.calls, harness.d.calls, d1.calls) == (0, 4, 4, 0)
    harness.p.tell(stalled_seconds=0)
    p1.tell(stalled_seconds=5)
    await harness.seen(lambda: harness.router.view.stalled == {"p1", "d1"})
    assert await harness.collect(a_request()) == foretold(a_request())
    assert harness.p.calls == 1


async def test_the_only_workers_take_requests_though_they_stall(harness: Harness) -> None:
    for worker in (harness.p, harness.d):
        worker.tell(stalled_seconds=5)
    await harness.seen(lambda: harness.router.view.stalled == {"p0", "d0"})
    assert harness.router.ready()
    assert await harness.collect(a_request()) == foretold(a_request())


async def test_a_request_that_waits_for_a_load_goes_elsewhere_if_the_worker_stalls(harness: Harness) -> None:
    harness.p.load_seconds = 60.0
    request = a_request(adapter="new")
    waiting = asyncio.create_task(harness.collect(request))
    await harness.seen(lambda: harness.p.prefetched)
    p1, _ = await harness.second()
    await asyncio.sleep(0.1)
    assert not p1.prefetched
    harness.p.tell(stalled_seconds=5)
    async with asyncio.timeout(10):
        assert await waiting == foretold(request)
    assert (harness.p.calls, p1.calls) == (0, 1)


async def test_a_worker_that_broke_a_call_is_used_again() -> None:
    async with running(Harness()) as harness:
        harness.p.faults = [Fault(WorkerLost("a broken connection"))]
        request = a_request()
        assert await harness.collect(request) == foretold(request)


async def test_the_list_of_workers_is_read_again_after_whatever_the_store_answers(
    harness: Harness, caplog: pytest.LogCaptureFixture
) -> None:
    workers = harness.cluster.workers

    async def broken() -> Any:
        raise KeyError("what nobody expected")

    async def cancelled() -> Any:
        raise asyncio.CancelledError

    for fault in (broken, cancelled):
        harness.cluster.workers = fault  # type: ignore[method-assign]
        await harness.seen(lambda: "the registrations of workers are not read" in caplog.text)
        caplog.clear()
    harness.cluster.workers = workers  # type: ignore[method-assign]
    await harness.second()


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("stage", ["queue", "prefill", "push", "decode"])
async def test_closing_ends_every_generation_at_once(n: int, stage: str) -> None:
    """With an error that says why, wherever the request is."""
    async with running(Harness(), max_inflight_prefills=1) as harness:
        request = a_request(max_tokens=50, n=n)
        first = asyncio.Event()

        async def read() -> None:
            async with harness.router.generate(request) as generation:
                async for _ in generation:
                    first.set()

        hour = Fault(seconds=3600)
        if stage == "queue":
            harness.p.faults = [hour]
            other = asyncio.create_task(read())
            await harness.seen(lambda: harness.p.calls == 1)
        elif stage == "prefill":
            harness.p.faults = [hour]
        elif stage == "push":
            harness.p.push_faults = [hour]
        else:
            harness.d.choice_faults = {index: [Fault(seconds=3600, after=3)] for index in range(n)}
        reading = asyncio.create_task(read())
        if stage == "queue":
            await harness.seen(lambda: harness.router.stats().waiting == 1)
        elif stage == "prefill":
            await harness.seen(lambda: harness.p.calls == 1)
        elif stage == "push":
            await first.wait()
        else:
            await harness.seen(lambda: harness.d.calls == n)
        started = time.monotonic()
        await harness.router.close()
        for task in (reading, other) if stage == "queue" else (reading,):
            with pytest.raises(Unavailable, match="shutting down"):
                await asyncio.wait_for(task, 10)
        assert time.monotonic() - started < 8
        with pytest.raises(Unavailable, match="shutting down"):
            await harness.collect(a_request())


async def test_closing_takes_nothing_from_a_request_that_is_complete(harness: Harness) -> None:
    request = a_request(max_tokens=4)
    tokens: list[int] = []
    async with harness.router.generate(request) as generation:
        async for delta in generation:
            tokens += delta.token_ids
            if delta.finish_reason is not None:
                await harness.router.close()
    assert tokens == foretold(request)[0]


async def test_a_closed_router_refuses(harness: Harness) -> None:
    router = Router(harness.cluster, FAST, SECRET)  # type: ignore[arg-type]
    async with router:
        assert router.ready()
    assert not router.ready()
    with pytest.raises(Unavailable):
        async with router.generate(a_request()):
            pass


# Several routers, and workers that fail


async def test_two_routers_never_overrun_a_workers_slots(harness: Harness) -> None:
    """The worker refuses one adapter too many, and that router places the request again: nobody fails."""
    slots = await harness.cluster.add_prefill("p1", adapter_slots=2, delay=0.02)
    harness.p.registered = False
    await harness.known()
    async with Router(harness.cluster, FAST, SECRET) as other:  # type: ignore[arg-type]
        await harness.seen(lambda: set(other.view.workers) == {"p1", "d0"} and other.ready())
        requests = [a_request(3, prompt=range(i + 1), adapter=f"a{i % 7}") for i in range(60)]

        async def through(router: Router, request: GenerateRequest) -> list[int]:
            async with router.generate(request) as generation:
                return [token async for delta in generation for token in delta.token_ids]

        routers = (harness.router, other)
        results = await asyncio.gather(*(through(routers[i % 2], request) for i, request in enumerate(requests)))
        assert results == [foretold(request)[0] for request in requests]
        assert slots.most_adapters == 2
        assert slots.cold == []
        assert harness.router.stats().retries == other.stats().retries == 0
        assert len(slots.callers) == 2
    harness.p.registered = True


async def test_what_other_routers_use_is_seen(harness: Harness) -> None:
    harness.p.tell(others={digest_of("bob"): 1}, other_prompts=3)
    harness.d.tell(other_sequences=5)
    views = harness.router.view.workers
    await harness.seen(lambda: views["p0"].slots_used == 1 and views["p0"].load == 3)
    assert views["p0"].in_slot(digest_of("bob"))
    await harness.seen(lambda: harness.router.view.fullness(views["d0"]) == 5 / 80)
    harness.p.tell_truth()
    await harness.seen(lambda: views["p0"].slots_used == 0)


async def test_a_worker_that_fails_again_and_again_is_left_alone_for_a_while() -> None:
    async with running(Harness(), retries=3) as harness:
        p1, _ = await harness.second()
        harness.p.faults = [Fault(EngineFailed("broken")) for _ in range(100)]
        for i in range(30):
            request = a_request(adapter=None, prompt=range(i + 1))
            assert await harness.collect(request) == foretold(request)
        assert harness.p.calls < 10
        assert p1.calls == 30
        harness.p.faults = []
        view = harness.router.view.workers["p0"]
        view.paused_until = 0.0  # the pause is over
        for i in range(10):
            await harness.collect(a_request(adapter=None, prompt=range(i + 100)))
        assert view.failures == 0


@pytest.mark.parametrize("error", [NumbersNotFinite("overflow"), AdapterUnavailable("gone"), TransferFailed("peer")])
async def test_a_bad_request_says_nothing_against_its_worker(harness: Harness, error: PreftError) -> None:
    """Nor an adapter that can't be read, nor a peer: one user's adapter must not pause a worker for all others."""
    harness.p.faults = [Fault(error) for _ in range(3)]
    with pytest.raises(type(error)):
        await harness.collect(a_request())
    harness.p.faults = []
    assert harness.router.view.workers["p0"].failures == 0
    assert await harness.collect(a_request()) == foretold(a_request())
