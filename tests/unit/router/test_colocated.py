"""A router over colocated workers: one call per choice to one worker, and the same promises as over two."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import pytest

from preft.core.errors import EngineFailed, InvalidAdapter, WorkerLost
from support.fake_workers import FakeDecode, Fault, a_request, digest_of, foretold
from support.router_harness import Harness, running


class Colocated(Harness):
    """Two colocated workers."""

    async def add_workers(self) -> None:
        self.workers: list[FakeDecode] = [await self.cluster.add_colocated(name) for name in ("c0", "c1")]

    @property
    def requests(self) -> list[tuple[str, int]]:
        """Which workers were asked, and with how many tokens so far."""
        return [(worker.id, len(asked.output_token_ids)) for worker in self.workers for asked in worker.choices]


@pytest.fixture
async def colocated() -> AsyncIterator[Colocated]:
    async with running(Colocated()) as harness:
        yield harness


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("adapter", ["ada", None])
@pytest.mark.parametrize("max_tokens", [1, 9])
async def test_tokens_come_whole_and_in_order(
    colocated: Colocated, n: int, adapter: str | None, max_tokens: int
) -> None:
    assert colocated.router.ready()
    request = a_request(max_tokens=max_tokens, n=n, adapter=adapter)
    assert await colocated.collect(request) == foretold(request)
    ((worker, _),) = set(colocated.requests)
    asked_workers = [each for each in colocated.workers if each.id == worker]
    (asked,) = {(one.adapter.digest, one.adapter_digest) for each in asked_workers for one in each.messages}
    assert asked == ((digest_of(adapter),) * 2 if adapter else ("", ""))
    assert colocated.cluster.released == []


async def test_many_requests_spread_and_an_adapter_stays(colocated: Colocated) -> None:
    requests = [a_request(2 + i % 7, n=1 + i % 3, prompt=range(i + 1), adapter=f"a{i % 5}") for i in range(60)]
    results = await asyncio.gather(*(colocated.collect(request) for request in requests))
    assert results == [foretold(request) for request in requests]
    assert all(worker.messages for worker in colocated.workers)


async def test_a_broken_stream_goes_on_elsewhere(colocated: Colocated) -> None:
    """With the tokens so far, under the same adapter; nothing is lost or repeated."""
    for worker in colocated.workers:
        worker.faults = [Fault(WorkerLost("gone"), after=4)]
    request = a_request(max_tokens=9)
    assert await colocated.collect(request) == foretold(request)
    assert sorted(done for _, done in colocated.requests) == [0, 4, 8]
    assert {asked.adapter.digest for worker in colocated.workers for asked in worker.messages} == {digest_of("ada")}


async def test_a_failure_before_the_first_token_is_tried_elsewhere(colocated: Colocated) -> None:
    request = a_request(max_tokens=5, n=2)
    for worker in colocated.workers:
        worker.faults = [Fault(EngineFailed("engine"))]
    assert await colocated.collect(request) == foretold(request)


async def test_leaving_cancels_everything(colocated: Colocated) -> None:
    for worker in colocated.workers:
        worker.delay = 0.01
    async with colocated.router.generate(a_request(max_tokens=10_000, n=2)) as generation:
        async for _ in generation:
            break
    await colocated.clean()
    assert sum(worker.cancelled for worker in colocated.workers) == 2


async def test_a_choice_that_is_stopped_ends_alone(colocated: Colocated) -> None:
    for worker in colocated.workers:
        worker.delay = 0.01
    request = a_request(max_tokens=40, n=2)
    tokens: list[int] = []
    async with colocated.router.generate(request) as generation:
        async for delta in generation:
            if delta.index == 0:
                generation.stop(0)
            else:
                tokens += delta.token_ids
    assert tokens == foretold(request)[1]


async def test_a_cold_adapter_delays_nobody_else(colocated: Colocated) -> None:
    for worker in colocated.workers:
        worker.load_seconds = 1.0
    cold = [asyncio.create_task(colocated.collect(a_request(adapter="new", n=2))) for _ in range(3)]
    await colocated.seen(lambda: any(worker.prefetched for worker in colocated.workers))
    assert colocated.idle
    started = time.monotonic()
    for _ in range(10):
        await colocated.collect(a_request(adapter=None))
    assert time.monotonic() - started < 0.9
    assert not any(task.done() for task in cold)
    assert await asyncio.gather(*cold) == [foretold(a_request(adapter="new", n=2))] * 3
    assert [digest for worker in colocated.workers for digest in worker.prefetched] == [digest_of("new")]
    assert [digest for worker in colocated.workers for digest in worker.cold] == []


async def test_a_refused_load_is_the_answer(colocated: Colocated) -> None:
    for worker in colocated.workers:
        worker.load_faults = [Fault(InvalidAdapter("broken"))]
    for _ in colocated.workers:  # a worker that has just refused isn't asked again
        with pytest.raises(InvalidAdapter, match="broken"):
            await colocated.collect(a_request())
    assert await colocated.collect(a_request()) == foretold(a_request())


@pytest.mark.parametrize("n", [1, 3])
async def test_slots_are_for_prompts(colocated: Colocated, n: int) -> None:
    """Never more adapters at once; free from the last choice's first token on, while all are still decoded."""
    for worker in colocated.workers:
        worker.adapter_slots, worker.prompt_seconds, worker.delay = 1, 0.01, 0.005
    await colocated.known()
    requests = [a_request(8, n=n, adapter=f"a{i % 5}") for i in range(20)] + [a_request(adapter=None)] * 3
    results = await asyncio.gather(*(colocated.collect(request) for request in requests))
    assert results == [foretold(request) for request in requests]
    assert [worker.most_adapters for worker in colocated.workers] == [1, 1]

    for worker in colocated.workers:
        worker.delay = 0.02
    async with colocated.router.generate(a_request(10_000)) as long:
        await anext(aiter(long))
        for i in range(5):
            assert await colocated.collect(a_request(2, adapter=f"a{i}")) == foretold(a_request(2, adapter=f"a{i}"))


async def test_each_choice_computes_its_prompt_in_the_slot(colocated: Colocated) -> None:
    """One choice's first token isn't the others': only with the last is the slot free."""
    for worker in colocated.workers:
        worker.adapter_slots = 1
        worker.choice_faults = {1: [Fault(seconds=0.3)]}
    await colocated.known()
    views = colocated.router.view.workers
    async with colocated.router.generate(a_request(4, n=2)) as generation:
        stream = aiter(generation)
        assert (await anext(stream)).index == 0
        assert sum(views[worker.id].slots_used for worker in colocated.workers) == 1
        async for delta in stream:
            if delta.index == 1:
                break
        assert sum(views[worker.id].slots_used for worker in colocated.workers) == 0
