"""The load of `make chaos` sees every kind of bad answer. A small server invents the answers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import web

from bench.chaos.__main__ import figures_table, is_good
from bench.chaos.faults import Fault, kill_redis
from bench.chaos.load import AnswerFailed, Load, make_cases

RIGHT = [7, 8, 9]


class Answers:
    """A gateway whose next answers are given."""

    def __init__(self) -> None:
        self.next: list[str] = []
        self.url = ""

    async def complete(self, request: web.Request) -> web.StreamResponse:
        kind = self.next.pop(0) if self.next else "right"
        if kind == "refused":
            return web.json_response({"error": {"message": "no workers"}}, status=503)
        reply = web.StreamResponse()
        await reply.prepare(request)
        tokens = {"other": [7, 8, 1], "long": [*RIGHT, 9], "short": RIGHT[:2], "cut": RIGHT[:1]}.get(kind, RIGHT)
        for token in tokens:
            await _send(reply, json.dumps({"choices": [{"index": 0, "token_ids": [token]}]}))
        if kind == "error":
            await _send(reply, json.dumps({"error": {"message": "its engine died"}}))
        elif kind != "cut":
            await _send(reply, "[DONE]")
        return reply


async def _send(reply: web.StreamResponse, data: str) -> None:
    await reply.write(f"data: {data}\n\n".encode())


@pytest.fixture
async def answers() -> AsyncIterator[Answers]:
    answers, app = Answers(), web.Application()
    app.router.add_post("/v1/completions", answers.complete)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    answers.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield answers
    await runner.cleanup()


async def count_of(answers: Answers, kind: str, *, is_killed: bool = False) -> dict[str, int]:
    """What one answer of this kind adds to the counts, beside `sent`."""
    load = Load([answers.url], make_cases(["base"], 100, seed=0)[:1])
    await load.learn()
    answers.next = [kind]
    load.start(1)
    while load.counts.sent == 0:
        await asyncio.sleep(0)
    if is_killed:
        load.urls.clear()
    counts = (await load.stop()).as_json()
    assert counts.pop("sent") == 1
    assert len(counts.pop("errors")) == counts["failed"]
    return {key: value for key, value in counts.items() if value}


@pytest.mark.parametrize(
    ("kind", "counts"),
    [
        ("right", {}),
        ("other", {"wrong": 1}),
        ("long", {"wrong": 1, "duplicated": 1}),
        ("short", {"wrong": 1, "missing": 1}),
        ("error", {"failed": 1}),
        ("refused", {"failed": 1}),
        ("cut", {"failed": 1}),
    ],
)
async def test_each_kind_of_bad_answer_is_counted(answers: Answers, kind: str, counts: dict[str, int]) -> None:
    assert await count_of(answers, kind) == counts


async def test_a_killed_gateways_own_connections_are_counted_apart(answers: Answers) -> None:
    assert await count_of(answers, "cut", is_killed=True) == {"cut": 1}
    assert await count_of(answers, "error", is_killed=True) == {"failed": 1}


async def test_two_answers_without_a_fault_must_be_equal(answers: Answers) -> None:
    load = Load([answers.url, answers.url], make_cases(["base"], 100, seed=0)[:1])
    answers.next = ["right", "other"]
    with pytest.raises(AnswerFailed, match="case 0 has two answers"):
        await load.learn()


def test_cases_have_every_kind_of_parameters_for_every_model() -> None:
    cases = make_cases(["base", "ada"], 100, seed=0)
    assert cases == make_cases(["base", "ada"], 100, seed=0)
    assert [case["model"] for case in cases] == ["base"] * 4 + ["ada"] * 4
    assert [case.get("n") for case in cases[:4]] == [None, 2, None, None]


@pytest.mark.parametrize("key", ["failed", "cut", "wrong", "duplicated", "missing", "left"])
def test_a_fault_is_good_only_without_a_trace(key: str) -> None:
    figures: dict[str, Any] = {"sent": 9, "failed": 0, "cut": 0, "wrong": 0, "duplicated": 0, "missing": 0}
    figures |= {"recovery_s": 1.0, "left": {}, "errors": []}
    assert is_good(Fault("x", kill_redis), figures)
    figures[key] = {"running": 1} if key == "left" else 1
    assert not is_good(Fault("x", kill_redis), figures)
    assert is_good(Fault("x", kill_redis, may_cut=True), figures) is (key == "cut")
    assert "running" in figures_table({"x": figures}) or key != "left"
