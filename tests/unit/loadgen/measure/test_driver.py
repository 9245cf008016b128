"""Both loops against a scripted sender: how many are in flight, what is timed, and that failures are recorded."""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import replace

import pytest

from preft_loadgen.errors import RequestFailed
from preft_loadgen.measure.driver import closed_loop, open_loop
from preft_loadgen.measure.record import Record
from preft_loadgen.traffic.request import Request, Turn
from preft_loadgen.transport.http import HttpClient
from preft_loadgen.transport.reply import Reply
from preft_loadgen.transport.server import completions
from unit.loadgen.sse_server import DONE, HEAD, Call, chunk, event, fake_server, json_reply, tokens, usage

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
    sender, seen = Sender(), list[Record]()
    run = await closed_loop(sender, REQUESTS, concurrency, seen.append)
    assert sender.most == min(concurrency, len(REQUESTS))
    assert tuple(seen) == run.records
    assert sum(record.tokens for record in run.records) == 40
    assert run.seconds >= 0.01 * len(REQUESTS) / sender.most
    assert run.planned is None


async def test_an_open_loop_waits_for_nobody() -> None:
    sender = Sender(seconds=0.5)
    run = await open_loop(sender, REQUESTS[:5], [0.01 * i for i in range(5)])
    assert sender.most == 5
    started = sorted(record.started for record in run.records)
    assert started == pytest.approx([0.0, 0.01, 0.02, 0.03, 0.04])
    assert run.planned == pytest.approx(5 / 0.04)


async def test_an_open_loop_that_is_late_counts_the_delay() -> None:
    async def blocking(request: Request) -> Reply:
        time.sleep(0.1)  # noqa: ASYNC251
        now = time.perf_counter()
        return Reply(now, now, (now,), 4, "", "length")

    run = await open_loop(blocking, REQUESTS[:3], [0.0, 0.001, 0.002])
    assert max(record.ttft for record in run.records) > 0.25
    assert max(record.delay for record in run.records) > 0.15


async def test_a_failed_request_is_a_record_and_the_others_go_on() -> None:
    async def send(request: Request) -> Reply:
        if request.model == "bad":
            raise RequestFailed("404: no such model", 404)
        return await Sender()(request)

    run = await closed_loop(send, [*REQUESTS[:2], Request("bad", (5,), 4), *REQUESTS[:2]], 2)
    errors = [record for record in run.records if record.error is not None]
    assert [(one.error, one.kind, one.tokens) for one in errors] == [("404: no such model", "http 404", 0)]
    assert sum(record.answered for record in run.records) == 4


async def test_an_unexpected_error_is_not_swallowed() -> None:
    async def send(request: Request) -> Reply:
        raise ZeroDivisionError

    with pytest.raises(ExceptionGroup):
        await closed_loop(send, REQUESTS, 2)


async def test_conversations_go_on_with_the_answers() -> None:
    asked: list[Request] = []

    async def send(request: Request) -> Reply:
        asked.append(request)
        reply = await Sender(0.001)(request)
        return replace(reply, token_ids=(9,) * reply.tokens, text="so")

    later = (Turn((7,), 2), Turn((8,), 1))
    run = await closed_loop(send, [Request("m", (1,), 3, later=later)], 5)
    assert [request.whole_prompt() for request in asked] == [(1,), (1, 9, 9, 9, 7), (1, 9, 9, 9, 7, 9, 9, 8)]
    assert [record.turn for record in run.records] == [0, 1, 2]
    assert [record.tokens for record in run.records] == [3, 2, 1]
    starts = [record.started for record in run.records]
    assert starts == sorted(starts)
    text = await closed_loop(send, [Request("m", "hi", 1, later=(Turn(" and", 1),))], 5)
    assert len(text.records) == 2
    assert asked[-1].whole_prompt() == "hiso and"


async def test_a_conversation_ends_with_its_first_failure() -> None:
    run = await closed_loop(Sender(), [Request("m", (1,), 3, later=(Turn((7,), 2),))], 1)
    (record,) = run.records
    assert record.kind == "malformed"
    assert "token ids" in (record.error or "")


async def test_over_http() -> None:
    calls: list[Call] = []
    async with fake_server(lambda call: tokens(call, 0.005), calls) as url:
        run = await closed_loop(completions(HttpClient(url)), REQUESTS, 4)
    assert [record.error for record in run.records] == [None] * 10
    assert all(record.tokens == 4 and sum(record.counts) <= 3 and record.ttft > 0.004 for record in run.records)
    assert calls[0].body["model"] == "m"


async def test_refused_broken_and_short_answers_over_http() -> None:
    kinds = iter(("refuse", "break", "short", "whole"))

    async def script(call: Call) -> None:
        match next(kinds):
            case "refuse":
                await call.write(json_reply("503 Service Unavailable", {"error": {"message": "nobody there"}}))
            case "break":
                await call.write(HEAD + chunk(event("a")))
            case "short":
                await tokens(replace(call, body={"max_tokens": 2}))
            case "whole":
                await tokens(call)

    async with fake_server(script) as url:
        run = await closed_loop(completions(HttpClient(url)), REQUESTS[:4], 1)
    errors = [record.error for record in run.records]
    assert errors[0] == "503: nobody there"
    assert "connection broke" in (errors[1] or "")
    assert errors[2] == "2 tokens came where 4 were asked for"
    assert errors[3] is None
    assert [record.kind for record in run.records] == ["http 503", "broken stream", "length", ""]
    assert [record.tokens for record in run.records] == [0, 0, 0, 4]


async def test_a_hostile_server_gives_errors_and_never_a_wrong_figure() -> None:
    """Whole answers of four tokens, cut, doubled, filled with noise and reset at random places."""
    source = random.Random(5)
    whole = HEAD + chunk(b"".join([event("t")] * 3 + [event("t", "length")])) + chunk(usage(4) + DONE) + b"0\r\n\r\n"

    async def script(call: Call) -> None:
        place, kind = source.randrange(len(whole)), source.randrange(6)
        noise = source.randbytes(source.randrange(1, 40))
        damaged = {
            0: whole,
            1: whole[:place],
            2: whole[:place] + noise + whole[place:],
            3: whole[:place] + noise + whole[place + len(noise) :],
            4: whole[:place] + whole[: 2 * place],
            5: whole[:place],
        }
        await call.write(damaged[kind])
        if kind == 5:
            call.writer.transport.abort()

    async with fake_server(script) as url, HttpClient(url, timeout=5.0) as client:
        run = await closed_loop(completions(client), [Request("m", (1,), 4)] * 300, 8)
    answered = [record for record in run.records if record.answered]
    assert len(run.records) == 300
    assert 40 < len(answered) < 200  # noise in a text or between headers does no harm
    assert all(record.tokens == 4 and sum(record.counts) <= 3 for record in answered)
    assert all(record.kind and record.error for record in run.records if not record.answered)
    assert len({record.kind for record in run.records}) >= 4
