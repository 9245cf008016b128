"""A request whose numbers overflow ends with an error, and no other request's answer depends on it."""

from __future__ import annotations

import asyncio
import json
import random
from pathlib import Path
from typing import Any

import httpx
import pytest

from e2e.conftest import RANKS, REFTS, Served
from e2e.test_parity import check
from support.http import Ask, complete, post
from support.overflow import OVERFLOWING, OVERFLOWING_TOKEN

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

ROUNDS = 12
NEIGHBOURS = (None, *RANKS, *REFTS)


def load(served: Served, root: Path) -> None:
    for name, make in OVERFLOWING.items():
        body = {"lora_name": name, "lora_path": str(make(root / name, served.model))}
        assert post(served.cluster.url, "/v1/load_lora_adapter", body).status_code == 200


def unload(served: Served) -> None:
    for name in OVERFLOWING:
        assert post(served.cluster.url, "/v1/unload_lora_adapter", {"lora_name": name}).status_code == 200


def prompt_of(draw: random.Random, length: int) -> list[int]:
    return [draw.randrange(3, 512) for _ in range(length)]


async def ending(client: httpx.AsyncClient, body: dict[str, Any]) -> str:
    """The code of the error that ends this request, alone or after tokens in a stream; otherwise what came instead."""
    full = {"temperature": 0, "ignore_eos": True, "return_token_ids": True, "max_tokens": 12, **body}
    response = await client.post("/v1/completions", json=full)
    if response.status_code != 200:
        return str(response.json()["error"]["code"])
    if not body["stream"]:
        return response.text
    *events, last, done = [line[6:] for line in response.text.splitlines() if line.startswith("data: ")]
    finished = any(json.loads(event)["choices"][0]["finish_reason"] for event in events)
    if "error" not in last or finished or done != "[DONE]":
        return response.text
    return str(json.loads(last)["error"]["code"])


def test_neighbours_stay_exact_and_overflow_is_an_error(tight: Served, tmp_path: Path) -> None:
    """Round after round over a small pool of blocks: whatever an overflowing request had, others get next."""
    load(tight, tmp_path)
    draw = random.Random(31)
    bad = [*OVERFLOWING, None]  # the base model overflows by itself
    asks: list[Ask] = []
    got: list[list[int]] = []
    endings: list[str] = []

    async def main() -> None:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=tight.cluster.url, timeout=300, limits=limits) as client:

            async def overflow(number: int) -> None:
                adapter = bad[number % len(bad)]
                prompt = prompt_of(draw, draw.choice((3, 40, 90, 200)))
                if adapter is None:
                    prompt[draw.randrange(len(prompt))] = OVERFLOWING_TOKEN
                body = {"model": adapter or tight.name, "prompt": prompt, "stream": number % 2 == 1}
                endings.append(await ending(client, body))

            async def neighbour(ask: Ask) -> list[int]:
                return list((await complete(client, tight.name, ask))["choices"][0]["token_ids"])

            for number in range(ROUNDS):
                near = [
                    Ask(prompt_of(draw, draw.choice((1, 5, 20, 33, 70, 130))), 10, NEIGHBOURS[i % len(NEIGHBOURS)])
                    for i in range(8)
                ]
                overflows = [overflow(3 * number + i) for i in range(3)]
                if number % 2:  # one after the other, then all at once
                    for one in overflows:
                        await one
                    overflows = []
                answers = await asyncio.gather(*(neighbour(ask) for ask in near), *overflows)
                asks.extend(near)
                got.extend(answer for answer in answers if answer is not None)

    asyncio.run(main())
    unload(tight)
    check(tight, asks, got)
    assert set(endings) == {"numbers_not_finite"}
    assert tight.cluster.idle()


def test_overflow_while_decoding(tight: Served) -> None:
    """The prompt is sound, the first output token isn't: the error follows it, and the blocks do no harm."""
    draw = random.Random(32)
    forced = {str(OVERFLOWING_TOKEN): 100}
    asks = [Ask(prompt_of(draw, 40), 10, NEIGHBOURS[i % len(NEIGHBOURS)]) for i in range(16)]

    endings: list[str] = []

    async def main() -> list[list[int]]:
        async with httpx.AsyncClient(base_url=tight.cluster.url, timeout=300) as client:
            for number, ask in enumerate(asks):
                model = ask.adapter or tight.name
                body = {"model": model, "prompt": ask.prompt, "logit_bias": forced, "stream": number % 2 == 0}
                endings.append(await ending(client, body))
            answers = await asyncio.gather(*(complete(client, tight.name, ask) for ask in asks))
            return [answer["choices"][0]["token_ids"] for answer in answers]

    check(tight, asks, asyncio.run(main()))
    assert set(endings) == {"numbers_not_finite"}
    assert tight.cluster.idle()
