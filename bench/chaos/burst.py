"""A burst of requests for cold adapters in the instant in which the first gateway is ready."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import aiohttp

from bench.chaos.load import REQUEST_SECONDS, AnswerFailed, Counts, Load, Tokens, ask, compare, make_cases
from bench.chaos.ray_cluster import COLD

REQUESTS = 500
TOKENS = 12
NAME = f"{REQUESTS} requests for {len(COLD)} cold adapters at the first ready answer"


class Burst:
    """`send` sends all requests at once. `figures` compares the answers with those of the cluster at rest."""

    def __init__(self, vocabulary: int) -> None:
        greedy = [case for case in make_cases(COLD, vocabulary, seed=1) if case["temperature"] == 0]
        self._cases = [{**case, "max_tokens": TOKENS} for case in greedy]
        self._answers: list[Tokens | AnswerFailed] = []
        self._seconds = 0.0

    async def send(self, url: str) -> None:
        began = time.monotonic()
        connector = aiohttp.TCPConnector(limit=0)
        timeout = aiohttp.ClientTimeout(REQUEST_SECONDS)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:

            async def one(number: int) -> Tokens | AnswerFailed:
                try:
                    return await ask(session, url, self._cases[number % len(self._cases)])
                except AnswerFailed as error:
                    return error

            self._answers = list(await asyncio.gather(*map(one, range(REQUESTS))))
        self._seconds = time.monotonic() - began

    async def figures(self, urls: list[str]) -> dict[str, Any]:
        """Raises AnswerFailed if the cluster at rest doesn't answer."""
        rest = Load(urls, self._cases)
        await rest.learn()
        counts = Counts(sent=len(self._answers))
        for number, answer in enumerate(self._answers):
            if isinstance(answer, AnswerFailed):
                counts.failed += 1
                counts.errors.append(str(answer)[:300])
            else:
                compare(counts, answer, rest.expected[number % len(self._cases)])
        return {**counts.as_json(), "recovery_s": round(self._seconds, 1), "left": {}}
