"""The load generator against PreFT's real HTTP and gRPC doors, whose answers depend on the adapter's content."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from preft.core.request import GenerateRequest
from preft_loadgen.measure.sweep import Churning, ClosedLoop, Load, Population, population, run_sweep
from preft_loadgen.traffic.lengths import Lengths
from preft_loadgen.traffic.prompts import Ids, RandomPrompts, Words
from preft_loadgen.transport.server import Api, open_server
from support import small_tokenizers
from support.fakes import Script
from support.sdk_gateway import IDS, ScriptedGateway, scripted_gateway

PROMPTS = RandomPrompts(Lengths(3, 9), Lengths(6, 12), Ids(60, 30))


@pytest.fixture
async def gateway(tmp_path: Path) -> AsyncIterator[ScriptedGateway]:
    """Four adapters; an answer's tokens follow from the adapter's digest and the prompt."""

    def answer(request: GenerateRequest) -> Script:
        digest = request.adapter.digest if request.adapter else ""
        source = random.Random(f"{digest} {request.prompt_token_ids}")
        return Script(source.choices(IDS, k=request.sampling.max_tokens or 1), delay=0.002)

    async with scripted_gateway(small_tokenizers.byte_level(tmp_path / "model")) as gateway:
        gateway.generator.script = answer
        for name in "abcd":
            await gateway.catalog.add(name, f"/adapters/{name}")
        yield gateway


@pytest.mark.parametrize("door", ["http", "grpc"])
async def test_sweeps_with_churn_and_verification(gateway: ScriptedGateway, door: str) -> None:
    load = Load(120, PROMPTS, ClosedLoop(8), verify=True, churn=Churning(0.05, ("/adapters/x", "/adapters/y")))
    async with open_server(gateway.urls[door]) as server:
        models = await population(server, base="base")
        assert models == Population("base", ("a", "b", "c", "d"))
        found = await run_sweep(server, load, [0, 4], models)
    for one in found:
        assert one.summary.first_error is None
        assert one.summary.verify is not None
        assert (one.summary.verify.right, one.summary.verify.answers) == (120, 120)
        assert one.summary.prompt_tokens >= 3 * 120
    assert {change.error for change in found[1].changes} == {None}
    assert [adapter.name for adapter in gateway.catalog.list()] == ["a", "b", "c", "d"]


async def test_a_gateway_that_confuses_adapters_is_found_out(gateway: ScriptedGateway) -> None:
    right = gateway.generator.script
    asked = 0

    def confused(request: GenerateRequest) -> Script:
        nonlocal asked
        asked += 1
        if asked > 2 * 3 and request.adapter is not None and request.adapter.name == "b":  # after the calm pass
            object.__setattr__(request, "adapter", None)
        return right(request)

    gateway.generator.script = confused
    load = Load(40, PROMPTS, ClosedLoop(4), verify=True, warm_up=False)
    async with open_server(gateway.urls["http"]) as server:
        (found,) = await run_sweep(server, load, [2], await population(server))
    assert found.summary.verify is not None
    assert found.summary.verify.wrong_by == {"base": 20}
    assert found.summary.verify.right == 20


@pytest.mark.parametrize("door", ["http", "grpc"])
async def test_conversations_and_cancels(gateway: ScriptedGateway, door: str) -> None:
    async with open_server(gateway.urls[door]) as server:
        models = await population(server, base="base")
        load = Load(12, PROMPTS, ClosedLoop(4), turns=Lengths(3, 3))
        (talk,) = await run_sweep(server, load, [2], models)
        (cut,) = await run_sweep(server, Load(12, PROMPTS, ClosedLoop(4), cancel=1.0), [2], models)
    assert (talk.summary.answers, talk.summary.first_error) == (36, None)
    prompts = [len(request.prompt_token_ids) for request in gateway.generator.requests]
    assert max(prompts) > 9 + 6  # later turns hold the earlier ones and their answers
    assert (cut.summary.cancelled, cut.summary.errors) == (12, 0)
    async with asyncio.timeout(10):
        while len(gateway.generator.left) < len(gateway.generator.entered):
            await asyncio.sleep(0.01)


async def test_chats(gateway: ScriptedGateway) -> None:
    prompts = RandomPrompts(Lengths(3, 5), Lengths(4, 4), Words())
    async with open_server(gateway.urls["http"], api=Api.CHAT) as server:
        (found,) = await run_sweep(server, Load(8, prompts, material=Words()), [4], await population(server))
    assert (found.summary.answers, found.summary.first_error, found.summary.tokens) == (8, None, 32)
