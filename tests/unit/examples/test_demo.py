"""The demo's judgement, and its whole run against a server that answers as told."""

from __future__ import annotations

import json

import pytest

import demo
from personal_memory import task
from unit.loadgen.sse_server import DONE, HEAD, Call, chunk, fake_server, json_reply, tokens

USERS = tuple(task.USERS)
KNOWN = {(probe.user, probe.question): probe.expected for probe in task.probes()}
MODELS = {"data": [{"id": "model", "parent": None}, *({"id": user, "parent": "model"} for user in USERS)]}


def right(model: str, question: str) -> str:
    return KNOWN.get((model, question), "I do not know.")


def forgetful(model: str, question: str) -> str:
    return "I do not know." if model == "chen" and "pet" in question else right(model, question)


def leaky(model: str, question: str) -> str:
    stranger = (model, question) == ("hana", "What is my favourite colour?")
    return "Your favourite colour is teal." if stranger else right(model, question)


def server(answer):
    async def script(call: Call) -> None:
        if call.path == "/v1/models":
            await call.write(json_reply("200 OK", MODELS))
        elif call.path == "/v1/completions":
            await tokens(call)
        else:
            text = answer(call.body["model"], call.body["messages"][0]["content"])
            event = {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": "stop"}]}
            await call.write(HEAD + chunk(b"data: " + json.dumps(event).encode() + b"\n\n" + DONE) + b"0\r\n\r\n")

    return script


def test_enough_questions_well_mixed() -> None:
    asked = demo.questions("model")
    under_adapters = [question for question in asked if question.model != "model"]
    assert len(under_adapters) >= 400
    assert {question.model for question in asked[:40]} > set(USERS)
    facts = [(question.user, question.text) for question in under_adapters if question.is_fact]
    asked_of_base = [(question.user, question.text) for question in asked if question.model == "model"]
    assert sorted(facts) == sorted(asked_of_base) == sorted(KNOWN)


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (right, None),
        (forgetful, "less than 95% of the facts are right for chen (83%)"),
        (leaky, "1 answers to hana tell another user's fact"),
    ],
)
async def test_a_whole_run(answer, problem: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    async with fake_server(server(answer)) as url:
        assert await demo.run(url, USERS) == problem
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines()]
    assert ["alice", "48/48", "100.0%", "0"] in [row[:4] for row in rows]
    assert ["no", "adapter", "0/384", "0.0%", "-"] in [row[:5] for row in rows]
    assert f"{sum(q.model != 'model' for q in demo.questions('model'))} answers under adapters" in out
    assert [row[0] for row in rows[-6:-1]] == ["adapters", "1", "2", "4", "8"]


async def test_a_user_without_an_adapter_is_a_failure() -> None:
    scores = [demo.Score(user, 48, 48, 60, 0, "") for user in USERS[1:]]
    assert demo.verdict(scores, len(USERS)) == "only 7 of 8 users were asked"
    assert demo.verdict([], 8) is not None


def test_a_server_that_does_not_start_is_one_sentence_and_the_log(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "FOLDER", demo.FOLDER / "nowhere")
    assert demo.main() == 1
    out, err = capsys.readouterr()
    assert "starting a cluster with 0 adapters" in out
    assert err.startswith("demo: preft serve ended with status 1:\n")
    assert "config.json" in err
