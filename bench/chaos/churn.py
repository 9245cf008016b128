"""Thousands of requests of which many are cancelled, while workers are killed and an adapter changes and goes."""

from __future__ import annotations

import asyncio
import random
from contextlib import suppress
from typing import Any

import aiohttp

from bench.chaos.cluster import EXAMPLE, ChaosCluster
from bench.chaos.faults import kill_spares
from bench.chaos.load import PROMPT, REQUEST_SECONDS, AnswerFailed, Load, Tokens, ask
from preft.core.errors import PreftError

REQUESTS = 2000
AT_ONCE = 24
CANCELLED = 0.3  # share of the requests
CANCEL_SECONDS = 1.5  # until a client gives up, at most
SWAPPED = 0.2  # share of the requests that name the changing adapter
SWAP = "swap"
VERSIONS = ("alice", "bruno")  # its contents in turn
SWAP_SECONDS = 1.5
ABSENT_SECONDS = 0.3
PROMPTS = 4


class Churn:
    """Owns the changing adapter. Its answers must be those of one of its versions, or 404 while it is away."""

    def __init__(self, cluster: ChaosCluster, load: Load, vocabulary: int) -> None:
        self._cluster, self._load = cluster, load
        self._draw = random.Random(0)
        self._bodies = [
            {
                "model": SWAP,
                "prompt": [self._draw.randrange(4, vocabulary) for _ in range(self._draw.randint(*PROMPT))],
                **{"max_tokens": 30, "temperature": 0, "ignore_eos": True, "stream": True, "return_token_ids": True},
            }
            for _ in range(PROMPTS)
        ]
        self._known: list[list[Tokens]] = []  # by prompt: each version's answer
        self.changes = self.absent = 0

    async def run(self) -> dict[str, Any]:
        """Returns facts about what was done; the load has the counts."""
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(REQUEST_SECONDS)) as session:
            await self._learn(session)
            await self._put(session, VERSIONS[0])
            others = [asyncio.create_task(self._change(session)), asyncio.create_task(kill_spares(self._cluster))]
            turn = asyncio.Semaphore(AT_ONCE)

            async def one() -> None:
                async with turn:
                    await self._request(session)

            try:
                await asyncio.gather(*(one() for _ in range(REQUESTS)))
            finally:
                for task in others:
                    task.cancel()
                await asyncio.gather(*others, return_exceptions=True)
            broken = [task for task in others if not task.cancelled() and task.exception() is not None]
            if broken:
                raise PreftError(f"the churn broke: {broken[0].exception()!r}")
            await self._remove(session)
        return {"adapter_changes": self.changes, "answers_404": self.absent}

    async def _learn(self, session: aiohttp.ClientSession) -> None:
        """Raises PreftError unless each model answers differently: else no answer would show a lost adapter."""
        url = self._load.urls[0]
        for body in self._bodies:
            answers = [await ask(session, url, {**body, "model": model}) for model in (*VERSIONS, "base")]
            if any(answers.count(answer) > 1 for answer in answers):
                raise PreftError("a prompt doesn't tell the adapter's versions and the base model apart")
            self._known.append(answers[:-1])

    async def _request(self, session: aiohttp.ClientSession) -> None:
        gives_up = self._draw.uniform(0, CANCEL_SECONDS) if self._draw.random() < CANCELLED else None
        with suppress(TimeoutError):
            async with asyncio.timeout(gives_up):
                if self._draw.random() < SWAPPED:
                    await self._ask_swapped(session, self._draw.randrange(PROMPTS))
                else:
                    await self._load.one(session, self._draw.randrange(len(self._load.cases)))

    async def _ask_swapped(self, session: aiohttp.ClientSession, number: int) -> None:
        counts = self._load.counts
        counts.sent += 1
        try:
            tokens = await ask(session, self._load.next_url, self._bodies[number])
            counts.wrong += tokens not in self._known[number]
        except AnswerFailed as error:
            if str(error).startswith("404: "):
                self.absent += 1
            else:
                counts.failed += 1
                counts.errors.append(str(error)[:300])
        except asyncio.CancelledError:
            counts.cancelled += 1
            raise

    async def _change(self, session: aiohttp.ClientSession) -> None:
        while True:
            await asyncio.sleep(SWAP_SECONDS)
            if self._draw.random() < 0.3:
                await self._remove(session)
                await asyncio.sleep(ABSENT_SECONDS)
            await self._put(session, self._draw.choice(VERSIONS))
            self.changes += 1

    async def _put(self, session: aiohttp.ClientSession, version: str) -> None:
        body = {"name": SWAP, "source": str(EXAMPLE / "adapters" / version), "replace": True}
        async with session.post(f"{self._load.next_url}/v1/adapters", json=body) as reply:
            if reply.status != 200:
                raise PreftError(f"{SWAP} can't be added: {(await reply.text())[:300]}")

    async def _remove(self, session: aiohttp.ClientSession) -> None:
        async with session.delete(f"{self._load.next_url}/v1/adapters/{SWAP}") as reply:
            if reply.status != 200:
                raise PreftError(f"{SWAP} can't be removed: {(await reply.text())[:300]}")
