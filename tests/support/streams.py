"""A completion over fake engines that is streamed to a task, and the tokens that it must have in the end."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx

from preft.core.request import Sampling
from support.fake_engine import tokens_of


class Stream:
    """Made inside an event loop. `tokens` grow as they come."""

    def __init__(self, client: httpx.AsyncClient, model: str, number: int, length: int, digest: str = "") -> None:
        """`number` makes the prompt; `digest` is that of the adapter `model`, or "" if `model` is the base model."""
        self.tokens: list[int] = []
        self._prompt = [5, 6, number]
        self._length = length
        self._digest = digest
        self._task = asyncio.create_task(self._read(client, model))

    async def _read(self, client: httpx.AsyncClient, model: str) -> None:
        body: dict[str, Any] = {"model": model, "prompt": self._prompt, "max_tokens": self._length, "temperature": 0}
        body |= {"ignore_eos": True, "stream": True, "return_token_ids": True}
        async with client.stream("POST", "/v1/completions", json=body) as reply:
            assert reply.status_code == 200, await reply.aread()
            async for line in reply.aiter_lines():
                if line.startswith("data: {"):
                    event = json.loads(line[6:])
                    assert "error" not in event, event
                    self.tokens += event["choices"][0].get("token_ids") or []

    async def check(self) -> None:
        """Waits for the end. Fails unless the tokens are those of a run without a fault."""
        await self._task
        sampling = Sampling(max_tokens=self._length, temperature=0.0, ignore_eos=True)
        assert self.tokens == tokens_of(self._digest, self._prompt, sampling)
