"""Both loops against a scripted sender: how many are in flight, what is timed, and that failures are recorded."""

from __future__ import annotations

import asyncio
import time

import pytest
from preft_loadgen.driver import closed_loop, completions, open_loop
from preft_loadgen.http_stream import HttpClient, Reply, RequestFailed
from preft_loadgen.workload import Request

from unit.loadgen.sse_server import HEAD, Call, chunk, event, fake_server, json_reply, tokens

REQUESTS = [Request("m", (5, 6), 4) for _ in range(10)]


class Sender:
    """Answers each request after `seconds`, one text per token; counts how many are in flight."""

    def __init__(self, seconds: float = 0.01) -> None:
        self.seconds = seconds
        self.running = 0
        self.most = 0

    async def __call__(self, request: Request) -> Reply:
        started = time.perf_counter()
        self.running += 1
        self.most = max(self.most, self.running)
        await asyncio.sleep(self.seconds)
        self.running -= 1
        now = time.perf_counter()
        return Reply(started, now, (now,) * request.output_tokens, request.output_tokens, "", "length")


@pytest.mark.parametrize("concurrency", [1, 3, 50])
async def test_a_closed_loop_keeps_its_concurrency(concurrency: int) -> None:
    sender, steps = Sender(), []
    run = await closed_loop(sender, REQUESTS, concurrency, lambda: steps.append(1))
    assert sender.most == min(concurrency, len(REQUESTS))
    assert len(run.records) == len(steps) == len(REQUESTS)
    assert sum(record.tokens for record in run.records) == 40
    assert run.seconds >= 0.01 * len(REQUESTS) / sender.most


async def test_an_open_loop_waits_for_nobody() -> None:
    sender = Sender(seconds=0.2)
    run = await open_loop(sender, REQUESTS[:5], [0.01 * i for i in range(5)])
    assert sender.most == 5
    assert run.seconds < 0.6
    assert [round(record.started, 2) for record in sorted(run.records, key=lambda r: r.started)] == [
        *(0.0, 0.01, 0.02, 0.03, 0.04)
    ]


async def test_an_open_loop_that_is_late_counts_the_delay() -> None:
    async def blocking(request: Request) -> Reply:
        time.sleep(0.1)  # noqa: ASYNC251
        now = time.perf_counter()
        return Reply(now, now, (now,), 4, "", "length")

    run = await open_loop(blocking, REQUESTS[:3], [0.0, 0.001, 0.002])
    assert max(record.ttft for record in run.records) > 0.25


async def test_a_failed_request_is_a_record_and_the_others_go_on() -> None:
    async def send(request: Request) -> Reply:
        if request.model == "bad":
            raise RequestFailed("404: no such model", 404)
        return await Sender()(request)

    run = await closed_loop(send, [*REQUESTS[:2], Request("bad", (5,), 4), *REQUESTS[:2]], 2)
    errors = [record for record in run.records if record.error is not None]
    assert [(record.error, record.tokens) for record in errors] == [("404: no such model", 0)]
    assert sum(record.error is None for record in run.records) == 4


async def test_an_unexpected_error_is_not_swallowed() -> None:
    async def send(request: Request) -> Reply:
        raise ZeroDivisionError

    with pytest.raises(ExceptionGroup):
        await closed_loop(send, REQUESTS, 2)


async def test_over_http() -> None:
    calls: list[Call] = []
    async with fake_server(lambda call: tokens(call, 0.005), calls) as url:
        run = await closed_loop(completions(HttpClient(url)), REQUESTS, 4)
    assert [record.error for record in run.records] == [None] * 10
    assert all(record.tokens == 4 and len(record.gaps) == 3 and record.ttft > 0.004 for record in run.records)
    body = calls[0].body
    assert (body["model"], body["prompt"], body["max_tokens"]) == ("m", [5, 6], 4)
    assert body["ignore_eos"] is True


async def test_refused_broken_and_short_answers_over_http() -> None:
    kinds = iter(("refuse", "break", "short", "whole"))

    async def script(call: Call) -> None:
        match next(kinds):
            case "refuse":
                await call.write(json_reply("503 Service Unavailable", {"error": {"message": "nobody there"}}))
            case "break":
                await call.write(HEAD + chunk(event("a")))
            case "short":
                await tokens(Call(call.method, call.path, {"max_tokens": 2}, call.writer))
            case "whole":
                await tokens(call)

    async with fake_server(script) as url:
        run = await closed_loop(completions(HttpClient(url)), REQUESTS[:4], 1)
    errors = [record.error for record in run.records]
    assert errors[0] == "503: nobody there"
    assert "connection broke" in (errors[1] or "")
    assert errors[2] == "2 tokens came where 4 were asked for"
    assert errors[3] is None
    assert [record.tokens for record in run.records] == [0, 0, 0, 4]


async def test_texts_that_come_at_once_are_one_arrival() -> None:
    async def send(request: Request) -> Reply:
        return Reply(1.0, 9.0, (2.0, 3.0, 3.0, 5.0), 4, "", "length")

    (record,) = (await closed_loop(send, REQUESTS[:1], 1)).records
    assert record.gaps == (1.0, 2.0)
