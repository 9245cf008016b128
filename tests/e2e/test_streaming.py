"""Streams of real engines reach the client token by token."""

from __future__ import annotations

import asyncio
import random

import pytest

from e2e.conftest import Served
from preft_loadgen.transport.http import HttpClient
from preft_loadgen.transport.reply import Reply

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]

STREAMS, TOKENS = 40, 32


def pieces(reply: Reply) -> int:
    """How many there are that came apart from each other: by more than a busy machine puts between two reads."""
    return 1 + sum(later - earlier > 0.0005 for earlier, later in zip(reply.arrivals, reply.arrivals[1:], strict=False))


def test_no_stream_comes_in_one_piece(either: Served) -> None:
    """One client, one request after the other: the engines have nothing else to do."""
    draw = random.Random(0)
    models = [either.name, *either.adapters]

    async def main() -> list[Reply]:
        client = HttpClient(either.cluster.url)
        replies = []
        for number in range(STREAMS):
            body = {
                "model": models[number % len(models)],
                "prompt": [draw.randrange(3, 512) for _ in range(20)],
                "max_tokens": TOKENS,
                "temperature": 0,
                "ignore_eos": True,
            }
            replies.append(await client.stream("/v1/completions", body))
        return replies

    replies = asyncio.run(main())
    assert all(reply.tokens == TOKENS for reply in replies)
    assert [pieces(reply) for reply in replies if pieces(reply) < TOKENS // 4] == []
