"""Steady load of streamed requests, whose tokens are compared with those of the run without a fault."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import aiohttp

TOKENS = (60, 160)  # of an answer, least and most
PROMPT = (10, 80)
REQUEST_SECONDS = 300.0
PARAMETERS: tuple[dict[str, Any], ...] = (
    {"temperature": 0},
    {"temperature": 0, "n": 2},
    {"temperature": 0.8, "seed": 7},
    {"temperature": 0, "presence_penalty": 0.5, "frequency_penalty": 0.5, "repetition_penalty": 1.2},
)

Tokens = dict[int, list[int]]
"""The tokens of each choice."""


class AnswerFailed(Exception):
    """The gateway refused the request, or its answer ended with an error. `is_cut`: the connection broke."""

    def __init__(self, message: str, *, is_cut: bool = False) -> None:
        super().__init__(message)
        self.is_cut = is_cut


@dataclass(slots=True)
class Counts:
    """The answers of one fault. `cut` are connections of a gateway that was killed, `wrong` has other tokens."""

    sent: int = 0
    failed: int = 0
    cut: int = 0
    cancelled: int = 0  # by the client itself
    wrong: int = 0
    duplicated: int = 0  # answers with more tokens than without the fault
    missing: int = 0  # answers with fewer, and no error
    errors: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def make_cases(models: Sequence[str], vocabulary: int, seed: int) -> list[dict[str, Any]]:
    """Request bodies: each model with each kind of parameters."""
    source = random.Random(seed)
    cases = []
    for model, parameters in itertools.product(models, PARAMETERS):
        prompt = [source.randrange(4, vocabulary) for _ in range(source.randint(*PROMPT))]
        body = {"model": model, "prompt": prompt, "max_tokens": source.randint(*TOKENS), "ignore_eos": True}
        cases.append(body | parameters | {"stream": True, "return_token_ids": True})
    return cases


async def ask(session: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> Tokens:
    """One whole answer. Raises AnswerFailed."""
    tokens: Tokens = {}
    is_done = False
    try:
        async with session.post(f"{url}/v1/completions", json=body) as reply:
            if reply.status != 200:
                raise AnswerFailed(f"{reply.status}: {(await reply.text())[:200]}")
            async for line in reply.content:
                if line.startswith(b"data: {"):
                    event = json.loads(line[6:])
                    if "error" in event:
                        raise AnswerFailed(event["error"]["message"])
                    for choice in event["choices"]:
                        tokens.setdefault(choice["index"], []).extend(choice.get("token_ids") or ())
                is_done = is_done or line.startswith(b"data: [DONE]")
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        raise AnswerFailed(f"{type(error).__name__}: {error}", is_cut=True) from error
    if not is_done:
        raise AnswerFailed("the stream ended early", is_cut=True)
    return tokens


def compare(counts: Counts, tokens: Tokens, expected: Tokens) -> None:
    """Counts what differs from the answer without a fault."""
    lengths = [(len(tokens.get(index, ())), len(known)) for index, known in expected.items()]
    counts.duplicated += any(got > known for got, known in lengths)
    counts.missing += any(got < known for got, known in lengths)
    counts.wrong += tokens != expected


class Load:
    """Clients that send one case after the other, each to the next gateway, until `stop`."""

    def __init__(self, urls: Sequence[str], cases: Sequence[dict[str, Any]], *, key: str = "") -> None:
        """`key` is an API key; "": the gateways need none."""
        self.urls = list(urls)
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.counts = Counts()
        self.cases = cases
        self.expected: dict[int, Tokens] = {}  # by the case's number
        self._order = random.Random(0)
        self._turn = itertools.count()
        self._going = False
        self._clients: list[asyncio.Task[None]] = []

    @property
    def next_url(self) -> str:
        return self.urls[next(self._turn) % len(self.urls)]

    async def learn(self) -> None:
        """Asks each case at each gateway without a fault. Raises AnswerFailed if two answers differ."""
        async with self._session() as session:
            for url in self.urls:
                answers = await asyncio.gather(*(ask(session, url, case) for case in self.cases))
                for number, tokens in enumerate(answers):
                    if self.expected.setdefault(number, tokens) != tokens:
                        raise AnswerFailed(f"case {number} has two answers without a fault")

    async def probe(self) -> None:
        """Waits for an answer of each gateway. Raises AnswerFailed."""
        async with self._session() as session:
            await asyncio.gather(*(ask(session, url, self.cases[-1]) for url in self.urls))

    def start(self, clients: int) -> None:
        self.counts, self._going = Counts(), True
        self._clients = [asyncio.create_task(self._run()) for _ in range(clients)]

    async def stop(self) -> Counts:
        """Waits for the last answers."""
        self._going = False
        await asyncio.gather(*self._clients)
        return self.counts

    async def one(self, session: aiohttp.ClientSession, number: int) -> None:
        """Sends one case, and counts its answer."""
        url, counts = self.next_url, self.counts
        counts.sent += 1
        try:
            tokens = await ask(session, url, self.cases[number])
        except AnswerFailed as error:
            if error.is_cut and url not in self.urls:  # the gateway was killed
                counts.cut += 1
            else:
                counts.failed += 1
                counts.errors.append(str(error)[:300])
            return
        except asyncio.CancelledError:
            counts.cancelled += 1
            raise
        compare(counts, tokens, self.expected[number])

    def _session(self) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(REQUEST_SECONDS), headers=self._headers)

    async def _run(self) -> None:
        async with self._session() as session:
            while self._going:
                await self.one(session, self._order.randrange(len(self.cases)))
