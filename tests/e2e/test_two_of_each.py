"""Two prefill and two decode workers on real engines: any pair serves a request, the living take over from the dead.

The tests share one cluster and go from harmless to harmful: a killed worker doesn't come back.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from e2e.conftest import ROOMY, Folders, Served, serve
from preft.core.cluster import Role
from preft.worker.server import WorkerServer
from support.http import Ask, complete_all

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

MODELS = (None, "alice", "bob", "loreft", "both")
PENALTIES = {"presence_penalty": 0.7, "frequency_penalty": 0.3, "repetition_penalty": 1.1}
FORM = {"structured_outputs": {"regex": "([a-z]{3,5}[0-9]{2}, ){400}"}}  # longer than the streams
TOKENS = 300
ROUNDS = 8
RESUMED_WITHIN = 20.0  # seconds; an engine takes longer to start


@pytest.fixture(scope="module")
def pairs(folders: Callable[[str], Folders], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    two = {role: {**ROOMY[role], "replicas": 2} for role in ("prefill", "decode")}
    yield from serve(folders("llama"), tmp_path_factory.mktemp("state"), {**ROOMY, **two})


def workers(served: Served, role: Role) -> list[WorkerServer]:
    return [worker for worker in served.cluster.workers.values() if worker.record.role is role]


def prompt_of(length: int, seed: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(3, 512) for _ in range(length)]


@dataclass
class Stream:
    """One streamed completion: its tokens, when each event came, and what it ended with."""

    adapter: str | None
    prompt: list[int]
    sampling: dict[str, Any]
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    arrivals: list[float] = field(default_factory=list)
    finish_reason: str | None = None

    @property
    def longest_silence(self) -> float:
        return max(later - earlier for earlier, later in zip(self.arrivals, self.arrivals[1:], strict=False))

    async def run(self, client: httpx.AsyncClient, model: str) -> None:
        body = {
            "model": self.adapter or model,
            "prompt": self.prompt,
            "max_tokens": TOKENS,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
            **self.sampling,
        }
        async with client.stream("POST", "/v1/completions", json=body) as response:
            assert response.status_code == 200
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    self.take(json.loads(line[6:]))

    def take(self, event: dict[str, Any]) -> None:
        assert "error" not in event, event
        self.arrivals.append(time.monotonic())
        self.tokens += event["choices"][0]["token_ids"] or []
        self.text += event["choices"][0]["text"]
        self.finish_reason = event["choices"][0]["finish_reason"]


def streams() -> list[Stream]:
    """Greedy, with penalties, and with a form of output, under every kind of adapter and none."""
    return [
        Stream(adapter, prompt_of(40 + 13 * number, number), sampling)
        for number, adapter in enumerate(MODELS)
        for sampling in ({}, PENALTIES, FORM, {**FORM, **PENALTIES})
    ]


def run(served: Served, started: list[Stream], *, kill: Callable[[], None] | None = None) -> None:
    """Runs all streams at once to their ends; `kill` is called when each has some tokens."""

    async def main() -> None:
        async with httpx.AsyncClient(base_url=served.cluster.url, timeout=300) as client:
            tasks = [asyncio.create_task(stream.run(client, served.name)) for stream in started]
            while kill and not all(len(stream.tokens) >= 5 for stream in started):
                await asyncio.sleep(0.01)
            if kill:
                assert not any(stream.finish_reason for stream in started)
                await asyncio.to_thread(kill)
            await asyncio.gather(*tasks)

    asyncio.run(main())


def kill_engine(worker: WorkerServer) -> None:
    os.kill(worker.record.engine_pids[0], signal.SIGKILL)


def test_every_prefill_worker_hands_over_to_every_decode_worker(pairs: Served) -> None:
    """Workers are chosen by load, so a round of requests may leave out a pair; several rounds don't."""
    for number in range(ROUNDS):
        asks = [Ask(prompt_of(30 + seed % 60, seed), 40, MODELS[seed % len(MODELS)]) for seed in seeds_of(number)]
        answers = complete_all(pairs.cluster.url, pairs.name, asks)
        assert answers == [pairs.expected(ask.prompt, ask.max_tokens, ask.adapter) for ask in asks]
        if all_pairs(pairs) <= used_pairs(pairs):
            break
    assert used_pairs(pairs) == all_pairs(pairs)
    assert pairs.cluster.idle()


def seeds_of(number: int) -> range:
    return range(60 * number, 60 * number + 60)


def all_pairs(served: Served) -> set[tuple[str, str]]:
    """Each prefill worker's id with each decode worker's address."""
    receivers = [worker.record.address for worker in workers(served, Role.DECODE)]
    return {(worker.record.id, receiver) for worker in workers(served, Role.PREFILL) for receiver in receivers}


def used_pairs(served: Served) -> set[tuple[str, str]]:
    """Those that KV was pushed between."""
    ids = [worker.record.id for worker in workers(served, Role.PREFILL)]
    return {(key, receiver) for key in ids for receiver in served.cluster.senders[key].receivers}


def test_streams_go_on_at_the_living_decode_worker(pairs: Served) -> None:
    """The engine that serves most of them is killed: prompts are prefilled again, tokens so far are replayed."""
    undisturbed, disturbed = streams(), streams()
    run(pairs, undisturbed)
    killed: list[int] = []

    def kill() -> None:
        statuses = pairs.cluster.statuses()
        busiest = max(workers(pairs, Role.DECODE), key=lambda worker: statuses[worker.record.id].running)
        killed.append(statuses[busiest.record.id].running)
        kill_engine(busiest)

    resumed_before = pairs.cluster.gateway.router.stats().resumes
    run(pairs, disturbed, kill=kill)
    assert pairs.cluster.gateway.router.stats().resumes >= resumed_before + killed[0] > resumed_before
    for stream, same in zip(disturbed, undisturbed, strict=True):
        assert stream.tokens == same.tokens
        assert stream.finish_reason == "length"
        assert stream.longest_silence < RESUMED_WITHIN
        if "structured_outputs" in stream.sampling:
            assert re.fullmatch("([a-z]{3,5}[0-9]{2}, )*[a-z]{0,5}[0-9]{0,2},?", stream.text)
        if not stream.sampling:
            assert stream.tokens == pairs.expected(stream.prompt, TOKENS, stream.adapter)
    assert len({tuple(stream.tokens) for stream in disturbed}) == len(disturbed)


def test_adapters_move_to_the_living_prefill_worker(pairs: Served) -> None:
    first, second = workers(pairs, Role.PREFILL)
    asks = [Ask(prompt_of(50 + number, 90 + number), 40, adapter) for number, adapter in enumerate(MODELS)]
    expected = [pairs.expected(ask.prompt, ask.max_tokens, ask.adapter) for ask in asks]
    kill_engine(first)
    assert complete_all(pairs.cluster.url, pairs.name, asks) == expected
    assert pairs.cluster.statuses()[second.record.id].tiers.host_adapters >= len(MODELS) - 1
