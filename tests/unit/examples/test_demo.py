"""The demo's judgement, and its whole run against a server that answers as told."""

from __future__ import annotations

import json

import pytest

import demo
from personal_memory import task
from unit.loadgen.sse_server import DONE, HEAD, Call, chunk, fake_server, json_reply, tokens, usage

USERS = tuple(task.USERS)
ADAPTERS = tuple(f"{user}{kind}" for user in USERS for kind in demo.KINDS)
KNOWN = {(probe.user, probe.question): probe.expected for probe in task.probes()}
MODELS = {"data": [{"id": "model", "parent": None}, *({"id": name, "parent": "model"} for name in ADAPTERS)]}


def right(model: str, question: str) -> str:
    return KNOWN.get((demo.owner(model), question), "I do not know.")


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
            await call.write(
                HEAD + chunk(b"data: " + json.dumps(event).encode() + b"\n\n" + usage(1) + DONE) + b"0\r\n\r\n"
            )

    return script


def test_enough_questions_well_mixed() -> None:
    asked = demo.questions("model", ADAPTERS)
    under_adapters = [question for question in asked if question.model != "model"]
    assert len(under_adapters) >= 400
    assert {question.user for question in asked[:60]} == set(USERS)
    assert len({question.model for question in asked[:60]}) > len(USERS)
    for kind in (*demo.KINDS, None):
        facts = [
            (question.user, question.text)
            for question in asked
            if question.is_fact and question.model == ("model" if kind is None else question.user + kind)
        ]
        assert sorted(facts) == sorted(KNOWN)


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
        assert await demo.run(url, ADAPTERS) == problem
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines()]
    for name in ("alice", "alice-loreft", "alice-direft"):
        assert [name, "48/48", "100.0%", "0"] in [row[:4] for row in rows]
    assert ["no", "adapter", "0/384", "0.0%", "-"] in [row[:5] for row in rows]
    assert f"{sum(q.model != 'model' for q in demo.questions('model', ADAPTERS))} answers under adapters" in out
    assert [row[0] for row in rows[-6:-1]] == ["adapters", "1", "2", "4", "8"]


async def test_a_missing_adapter_is_a_failure() -> None:
    scores = [demo.Score(name, 48, 48, 60, 0, "") for name in ADAPTERS[1:]]
    assert demo.verdict(scores, len(ADAPTERS)) == "only 23 of 24 adapters were asked"
    assert demo.verdict([], 24) is not None


def test_a_server_that_does_not_start_is_one_sentence_and_the_log(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "FOLDER", demo.FOLDER / "nowhere")
    assert demo.main() == 1
    out, err = capsys.readouterr()
    assert "starting a cluster with 0 adapters" in out
    assert err.startswith("demo: preft serve ended with status 1:\n")
    assert "config.json" in err
