"""A sweep against a scripted server: which models are asked, in which order, and what it refuses."""

from __future__ import annotations

from collections import Counter

import pytest
from preft_loadgen.http_stream import HttpClient, RequestFailed
from preft_loadgen.sweep import Sweep, run_sweep, served_models
from preft_loadgen.workload import Lengths

from preft_loadgen.errors import InvalidArgument
from unit.loadgen.sse_server import Call, fake_server, json_reply, tokens

MODELS = {"data": [{"id": "base", "parent": None}, *({"id": name, "parent": "base"} for name in "abcd")]}
SWEEP = Sweep(requests=8, prompt=Lengths(3, 3), output=Lengths(4, 4), concurrency=2)


async def serve(call: Call) -> None:
    if call.path == "/v1/models":
        await call.write(json_reply("200 OK", MODELS))
    else:
        await tokens(call)


async def test_each_count_asks_its_adapters_evenly_after_a_warm_up() -> None:
    calls: list[Call] = []
    async with fake_server(serve, calls) as url:
        summaries = await run_sweep(HttpClient(url), SWEEP, [0, 1, 4])
    assert [(summary.adapters, summary.requests, summary.tokens) for summary in summaries] == [
        *((0, 8, 32), (1, 8, 32), (4, 8, 32))
    ]
    asked = [call.body for call in calls[1:]]
    measured = Counter(body["model"] for body in asked if body["max_tokens"] == 4)
    warmed = Counter(body["model"] for body in asked if body["max_tokens"] == 2)
    assert measured == {"base": 8, "a": 8 + 2, "b": 2, "c": 2, "d": 2}
    assert warmed == {"base": 1, "a": 2, "b": 1, "c": 1, "d": 1}
    prompts = [tuple(body["prompt"]) for body in asked if body["max_tokens"] == 4]
    assert len(set(prompts)) > 20


async def test_an_open_loop_sweep() -> None:
    async with fake_server(serve) as url:
        sweep = Sweep(requests=10, prompt=Lengths(3, 3), output=Lengths(4, 4), rate=200)
        (summary,) = await run_sweep(HttpClient(url), sweep, [2])
    assert (summary.requests, summary.errors) == (10, 0)


async def test_more_adapters_than_there_are() -> None:
    async with fake_server(serve) as url:
        with pytest.raises(InvalidArgument, match="8 adapters were asked for, the server has 4"):
            await run_sweep(HttpClient(url), SWEEP, [1, 8])


async def test_models() -> None:
    async with fake_server(serve) as url:
        assert await served_models(HttpClient(url)) == ("base", ("a", "b", "c", "d"))

    async def none(call: Call) -> None:
        await call.write(json_reply("200 OK", {"data": []}))

    async with fake_server(none) as url:
        with pytest.raises(RequestFailed, match="no base model"):
            await served_models(HttpClient(url))
