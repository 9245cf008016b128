"""A small concurrent HTTP client for tests: completions by token ids, tokens out."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx


@dataclass(frozen=True, slots=True)
class Ask:
    """One completion request: `model` None is the base model."""

    prompt: list[int]
    max_tokens: int
    adapter: str | None = None


async def complete(client: httpx.AsyncClient, model: str, ask: Ask, **extra: Any) -> dict[str, Any]:
    """The whole response body of a completion; raises on any status but 200."""
    body = {
        "model": ask.adapter or model,
        "prompt": ask.prompt,
        "max_tokens": ask.max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        **extra,
    }
    response = await client.post("/v1/completions", json=body)
    if response.status_code != 200:
        raise AssertionError(f"HTTP {response.status_code}: {response.text}")
    return dict(response.json())


def complete_all(url: str, model: str, asks: Sequence[Ask], **extra: Any) -> list[list[int]]:
    """Sends all asks at the same time; returns the token ids of each."""

    async def main() -> list[list[int]]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as client:
            bodies = await asyncio.gather(*(complete(client, model, ask, **extra) for ask in asks))
        return [body["choices"][0]["token_ids"] for body in bodies]

    return asyncio.run(main())


def post(url: str, path: str, body: Any, **kwargs: Any) -> httpx.Response:
    """One request, one response."""
    with httpx.Client(base_url=url, timeout=300) as client:
        return client.post(path, json=body, **kwargs)
