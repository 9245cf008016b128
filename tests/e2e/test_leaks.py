"""After any mixture of finished and cancelled requests, everything is where it was at the start."""

from __future__ import annotations

import asyncio
import random

import httpx
import pytest

from e2e.conftest import RANKS, Served

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

REQUESTS = 500
AT_ONCE = 48


def test_half_of_500_requests_are_cancelled_at_random_moments(llama: Served) -> None:
    draw = random.Random(0)
    finished = cancelled = 0

    async def one(client: httpx.AsyncClient, turn: asyncio.Semaphore, number: int) -> None:
        nonlocal finished, cancelled
        body = {
            "model": draw.choice([llama.name, *RANKS]),
            "prompt": [draw.randrange(3, 512) for _ in range(draw.choice((3, 40, 200)))],
            "max_tokens": 24,
            "ignore_eos": True,
            "temperature": 0,
            "n": draw.choice((1, 1, 1, 3)),
            "stream": draw.random() < 0.5,
        }
        gives_up_after = draw.uniform(0, 0.6) if number % 2 else None
        async with turn:
            try:
                async with asyncio.timeout(gives_up_after):
                    response = await client.post("/v1/completions", json=body)
                assert response.status_code == 200, response.text
                finished += 1
            except TimeoutError:
                cancelled += 1

    async def main() -> None:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=llama.cluster.url, timeout=300, limits=limits) as client:
            turn = asyncio.Semaphore(AT_ONCE)
            await asyncio.gather(*(one(client, turn, number) for number in range(REQUESTS)))

    assert llama.cluster.idle()
    asyncio.run(main())
    assert finished + cancelled == REQUESTS
    assert cancelled >= 150
    assert llama.cluster.idle(30), llama.cluster.statuses()
    assert llama.cluster.gateway.router.stats().in_flight == {}
    assert llama.cluster.gateway.router.stats().waiting == 0


def test_a_client_that_goes_away_stops_the_work_on_both_workers(llama: Served) -> None:
    body = {"model": "bob", "prompt": [5] * 100, "max_tokens": 1800, "ignore_eos": True, "stream": True}
    with (
        httpx.Client(base_url=llama.cluster.url, timeout=120) as client,
        client.stream("POST", "/v1/completions", json=body) as response,
    ):
        lines = response.iter_lines()
        for _ in range(10):
            next(lines)
        assert not llama.cluster.idle(0)
    assert llama.cluster.idle(10), llama.cluster.statuses()
