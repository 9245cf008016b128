"""The way of a token through every hop, from a fake engine to the client: none keeps it until another one comes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from preft.core.cluster import Role
from preft.core.settings import MiB, Settings
from preft.worker.server import StartEngine
from support.fake_engine import FakeEngine
from support.local_cluster import LocalCluster, local_cluster
from support.models import make_model

pytestmark = pytest.mark.timeout(60)

STREAMS, TOKENS = 40, 8


class StartPaced(StartEngine):
    """The decode engine makes a token each time `more` is released."""

    more: asyncio.Semaphore

    async def __call__(self, settings: Settings, role: Role, arena: str, adapter_arena: str) -> FakeEngine:
        engine = FakeEngine(role, arena, adapter_arena)
        if role is Role.DECODE:
            self.more = engine.one_by_one = asyncio.Semaphore(0)
        return engine


@pytest.fixture
def paced(tmp_path: Path) -> Iterator[tuple[LocalCluster, StartPaced]]:
    start = StartPaced()
    model = make_model(tmp_path / "model", max_position_embeddings=128)
    small = {"staging_bytes": MiB}
    with local_cluster(model, tmp_path / "state", start_engine=start, prefill=small, decode=small) as cluster:
        yield cluster, start


def test_each_token_arrives_before_the_next_one_is_made(paced: tuple[LocalCluster, StartPaced]) -> None:
    """So no stream comes in one piece, however fast or slow the machine is."""
    cluster, start = paced

    async def stream(client: httpx.AsyncClient) -> list[int]:
        body = {"model": "model", "prompt": [5, 6, 7], "max_tokens": TOKENS, "ignore_eos": True, "temperature": 0}
        events: list[int] = []
        async with client.stream(
            "POST", "/v1/completions", json={**body, "stream": True, "return_token_ids": True}
        ) as response:
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    events.append(len(json.loads(line[6:])["choices"][0]["token_ids"]))
                    if len(events) < TOKENS:
                        cluster.loop.call_soon_threadsafe(start.more.release)
        return events

    async def main() -> None:
        async with httpx.AsyncClient(base_url=cluster.url, timeout=20) as client:
            for _ in range(STREAMS):
                assert await stream(client) == [1] * TOKENS

    asyncio.run(main())
