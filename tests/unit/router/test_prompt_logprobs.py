"""The prompt's log probabilities come once, with choice 0's first token, whatever happens to workers."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator

import pytest

from preft.core.errors import EngineFailed, WorkerLost
from preft.core.request import GenerateRequest, PromptLogprobs
from support.fake_services import DecodeService, PrefillService
from support.fake_workers import FakeDecode, Fault, a_request, digest_of, foretold
from support.prompt_logprobs import made_up
from support.router_harness import Harness, running

TOKENS = range(3000)  # several messages


class Colocated(Harness):
    async def add_workers(self) -> None:
        self.workers: list[FakeDecode] = [await self.cluster.add_colocated(name) for name in ("c0", "c1")]


@pytest.fixture
async def harness() -> AsyncIterator[Harness]:
    async with running(Harness()) as harness:
        yield harness


@pytest.fixture
async def colocated() -> AsyncIterator[Colocated]:
    async with running(Colocated()) as harness:
        yield harness


def scored(max_tokens: int = 6, n: int = 1, top: int = 20) -> GenerateRequest:
    request = a_request(max_tokens=max_tokens, n=n, prompt=TOKENS)
    return dataclasses.replace(request, sampling=dataclasses.replace(request.sampling, prompt_logprobs=top))


async def check(harness: Harness, request: GenerateRequest) -> None:
    streams: dict[int, list[int]] = {index: [] for index in range(request.n)}
    found: list[tuple[int, bool, PromptLogprobs]] = []
    async with harness.router.generate(request) as generation:
        async for delta in generation:
            if delta.prompt_logprobs is not None:
                found.append((delta.index, streams[delta.index] == [] and delta.token_ids != (), delta.prompt_logprobs))
            streams[delta.index] += delta.token_ids
    assert streams == foretold(request)
    top = request.sampling.prompt_logprobs
    assert top is not None
    assert found == [(0, True, made_up(request.prompt_token_ids, top, digest_of("ada")))]


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("max_tokens", [1, 6])
async def test_they_come_with_the_first_token(harness: Harness, n: int, max_tokens: int) -> None:
    await check(harness, scored(max_tokens, n))
    await check(harness, scored(max_tokens, n, top=0))


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("max_tokens", [1, 6])
async def test_they_come_from_a_colocated_worker(colocated: Colocated, n: int, max_tokens: int) -> None:
    await check(colocated, scored(max_tokens, n))


async def test_a_lost_decode_worker_doubles_nothing(harness: Harness) -> None:
    await harness.second()
    for worker in harness.cluster.members.values():
        if isinstance(worker, FakeDecode):
            worker.faults = [Fault(WorkerLost("gone"), after=2)]
    await check(harness, scored(max_tokens=9, n=2))
    assert harness.router.stats().resumes >= 1


async def test_a_retried_prompt_doubles_nothing(harness: Harness) -> None:
    harness.p.faults = [Fault(EngineFailed("engine"))]
    await check(harness, scored())
    assert harness.router.stats().retries == 1


@pytest.mark.parametrize("after", [0, 2])
async def test_a_lost_colocated_worker_doubles_nothing(colocated: Colocated, after: int) -> None:
    for worker in colocated.workers:
        worker.choice_faults = {0: [Fault(WorkerLost("gone"), after=after)]}
    await check(colocated, scored(max_tokens=5, n=2))


async def test_a_worker_that_sends_none_is_an_error(
    harness: Harness, colocated: Colocated, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker of an earlier version doesn't know the parameter."""

    def too_short(self: object, request: object) -> PromptLogprobs:
        return made_up(TOKENS[:-1], 20)

    monkeypatch.setattr(PrefillService, "_prompt_logprobs", too_short)
    monkeypatch.setattr(DecodeService, "_prompt_logprobs", lambda *_: None)
    for served in harness, colocated:
        with pytest.raises(EngineFailed, match="log probabilities of the prompt"):
            await served.collect(scored())
        await served.clean()
