"""Two prefill and two decode workers on real engines: any pair serves a request, the living take over from the dead.

The tests share one cluster and go from harmless to harmful: a killed worker doesn't come back.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
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
from support.structured_reference import StructuredReference

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

MODELS = (None, "alice", "bob", "loreft", "both")
PENALTIES = {"presence_penalty": 0.7, "frequency_penalty": 0.3, "repetition_penalty": 1.1}
# Both forms are longer than the streams.
REGEX = {"structured_outputs": {"regex": "([a-z]{3,5}[0-9]{2}, ){400}"}}
ITEM = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[a-z]{2,6}$"},
        "kind": {"enum": ["red", "green", None, True]},
        "sizes": {"type": "array", "items": {"type": "integer", "minimum": -50, "maximum": 5000}, "maxItems": 3},
    },
    "required": ["name", "sizes"],
    "additionalProperties": False,
}
SCHEMA = {"type": "array", "items": ITEM, "minItems": 400}
JSON = {"structured_outputs": {"json": SCHEMA, "disable_any_whitespace": True}}
FORMS = ({}, REGEX, {**REGEX, **PENALTIES}, JSON, {**JSON, **PENALTIES, "n": 2})
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
class Output:
    """One choice of a stream: what came, and what it ended with."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None


@dataclass
class Stream:
    """One streamed completion: its choices, and when each event came."""

    adapter: str | None
    prompt: list[int]
    sampling: dict[str, Any]
    outputs: list[Output] = field(init=False)
    arrivals: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.outputs = [Output() for _ in range(self.sampling.get("n", 1))]

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
        for choice in event["choices"]:
            output = self.outputs[choice["index"]]
            output.tokens += choice["token_ids"] or []
            output.text += choice["text"]
            output.finish_reason = choice["finish_reason"]


def streams() -> list[Stream]:
    """Greedy, with penalties, with a form of output, with two choices, under every kind of adapter and none."""
    return [
        Stream(adapter, prompt_of(40 + 13 * number, number), sampling)
        for number, adapter in enumerate(MODELS)
        for sampling in (PENALTIES, *FORMS)
    ]


def run(served: Served, started: list[Stream], *, kill: Callable[[], None] | None = None) -> None:
    """Runs all streams at once to their ends; `kill` is called when each has some tokens."""

    async def main() -> None:
        async with httpx.AsyncClient(base_url=served.cluster.url, timeout=300) as client:
            tasks = [asyncio.create_task(stream.run(client, served.name)) for stream in started]
            outputs = [output for stream in started for output in stream.outputs]
            while kill and not all(len(output.tokens) >= 5 for output in outputs):
                await asyncio.sleep(0.01)
            if kill:
                assert not any(output.finish_reason for output in outputs)
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
    reference = StructuredReference(pairs.reference, pairs.model)
    for stream, same in zip(disturbed, undisturbed, strict=True):
        folder = pairs.adapters[stream.adapter] if stream.adapter else None
        penalties = {name: stream.sampling[name] for name in PENALTIES if name in stream.sampling}
        form = stream.sampling.get("structured_outputs")
        for output, other in zip(stream.outputs, same.outputs, strict=True):
            assert (output.tokens, output.finish_reason) == (other.tokens, "length")
            wrong = reference.first_difference(stream.prompt, output.tokens, TOKENS, folder, form, penalties)
            assert wrong is None, (wrong, stream)
    assert len({tuple(stream.outputs[0].tokens) for stream in disturbed}) == len(disturbed)
    assert max(stream.longest_silence for stream in disturbed) < RESUMED_WITHIN


def test_adapters_move_to_the_living_prefill_worker(pairs: Served) -> None:
    first, second = workers(pairs, Role.PREFILL)
    asks = [Ask(prompt_of(50 + number, 90 + number), 40, adapter) for number, adapter in enumerate(MODELS)]
    expected = [pairs.expected(ask.prompt, ask.max_tokens, ask.adapter) for ask in asks]
    kill_engine(first)
    assert complete_all(pairs.cluster.url, pairs.name, asks) == expected
    assert pairs.cluster.statuses()[second.record.id].tiers.host_adapters >= len(MODELS) - 1
