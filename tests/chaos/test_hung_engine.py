"""Real engines that are stopped under load: no request fails or gets a wrong token, and Ray starts another worker."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from preft_loadgen.served import Served, served
from support.http import Ask, complete
from support.models import make_lora, make_model
from support.reference import Reference

pytestmark = [pytest.mark.vllm, pytest.mark.long, pytest.mark.timeout(900)]

ENGINE_TIMEOUT = 10  # seconds; the tiny model's steps take milliseconds
ROLE = f"replicas: 2, kv_cache_bytes: 67108864, staging_bytes: 67108864, engine_timeout: {ENGINE_TIMEOUT}"
SETTINGS = f"""
prefill: {{{ROLE}, max_lora_rank: 16}}
decode: {{{ROLE}}}
"""
CLIENTS = 8
TOKENS = 60
COUNTERS = {"prefill": "preft_retries_total", "decode": "preft_resumes_total"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("hung")
    model = make_model(root / "tiny", "llama", seed=3)
    return model, make_lora(root / "erin", model, rank=8, seed=4)


@pytest.fixture(scope="module")
def server(folders: tuple[Path, Path]) -> Iterator[Served]:
    model, adapter = folders
    root = model.parent
    (root / "settings.yaml").write_text(SETTINGS)
    arguments = ["--model", str(model), "--adapter", f"erin={adapter}", "--served-model-name", "base"]
    arguments += ["--config", str(root / "settings.yaml"), "--dtype", "float32"]
    with served(arguments, state_dir=root / "state", log=root / "serve.log", ready_seconds=500) as running:
        yield running


@pytest.fixture(scope="module")
def asks() -> list[Ask]:
    draw = random.Random(5)
    return [Ask([draw.randrange(3, 512) for _ in range(50 + i)], TOKENS, (None, "erin")[i % 2]) for i in range(24)]


@pytest.fixture(scope="module")
def expected(folders: tuple[Path, Path], asks: list[Ask]) -> list[list[int]]:
    reference = Reference(folders[0])
    return [reference.greedy(ask.prompt, TOKENS, folders[1] if ask.adapter else None) for ask in asks]


class Load:
    """CLIENTS clients that ask all the time. `answers` holds each answer with the number of its ask."""

    def __init__(self, client: httpx.AsyncClient, asks: list[Ask]) -> None:
        self.answers: list[tuple[int, list[int]]] = []
        self._client = client
        self._asks = asks
        self._numbers = itertools.cycle(range(len(asks)))
        self._is_over = False
        self._tasks = [asyncio.create_task(self._ask()) for _ in range(CLIENTS)]

    async def _ask(self) -> None:
        while not self._is_over:
            number = next(self._numbers)
            body = await complete(self._client, "base", self._asks[number])
            self.answers.append((number, body["choices"][0]["token_ids"]))

    async def more(self, count: int) -> None:
        """Returns after `count` more answers. Fails if a request has failed."""
        wanted = len(self.answers) + count
        while len(self.answers) < wanted:
            for task in self._tasks:
                if task.done():
                    task.result()
            await asyncio.sleep(0.05)

    async def end(self) -> None:
        self._is_over = True
        await asyncio.gather(*self._tasks)


async def workers_of(client: httpx.AsyncClient, role: str) -> list[dict[str, Any]]:
    workers = (await client.get("/v1/workers")).json()["workers"]
    return [worker for worker in workers if worker["role"] == role]


async def figure(client: httpx.AsyncClient, name: str) -> float:
    """The value of a metric without labels."""
    found = re.search(rf"^{name} (\S+)$", (await client.get("/metrics")).text, re.MULTILINE)
    assert found is not None
    return float(found[1])


async def until_replaced(client: httpx.AsyncClient, load: Load, hung: dict[str, Any]) -> None:
    """Until the worker is ready in another process, while requests go on."""
    async with asyncio.timeout(300):
        while True:
            for worker in await workers_of(client, hung["role"]):
                if worker["id"] == hung["id"] and worker["pid"] != hung["pid"] and worker["state"] == "ready":
                    return
            await load.more(1)


@pytest.mark.parametrize("role", ["decode", "prefill"])
def test_a_stopped_engine_is_replaced_and_no_request_fails(
    server: Served, asks: list[Ask], expected: list[list[int]], role: str
) -> None:
    async def main() -> tuple[dict[str, Any], list[tuple[int, list[int]]], float]:
        async with httpx.AsyncClient(base_url=server.url, timeout=300) as client:
            load = Load(client, asks)
            await load.more(2 * CLIENTS)
            before = await figure(client, COUNTERS[role])
            hung = max(await workers_of(client, role), key=lambda worker: worker["status"]["running"])
            os.kill(hung["engine_pids"][0], signal.SIGSTOP)
            await until_replaced(client, load, hung)
            await load.more(2 * CLIENTS)
            await load.end()
            return hung, load.answers, await figure(client, COUNTERS[role]) - before

    hung, answers, moved = asyncio.run(main())
    assert [number for number, tokens in answers if tokens != expected[number]] == []
    assert moved > 0  # requests were there when the engine stopped
    [log] = server.state_dir.glob(f"logs/*/{hung['id'].partition('-')[2]}.log")
    assert f"it hung, and was killed after {ENGINE_TIMEOUT} s without a step" in log.read_text()
