"""Whose adapter answered: right, wrong and unclear answers are told apart, under churn too."""

from __future__ import annotations

import pytest

from preft_loadgen.errors import InvalidArgument
from preft_loadgen.measure.verify import CALM_NAME, Checker, Probes, calm_pass
from preft_loadgen.traffic.lengths import Lengths
from preft_loadgen.traffic.prompts import RandomPrompts
from preft_loadgen.traffic.request import Request
from unit.loadgen.fake_server import FakeServer

PROBES = Probes(RandomPrompts(Lengths(3, 3), Lengths(4, 4)), 0)
ASKED = [Request(model, probe.prompt, probe.output_tokens) for model in "abab" for probe in PROBES.all]


async def test_right_wrong_and_unclear() -> None:
    server = FakeServer(("a", "b"))
    steps: list[int] = []
    answers = await calm_pass(server, ("a", "b", "base"), (), PROBES, lambda: steps.append(1))
    assert (server.most, len(steps), len(server.requests)) == (1, 3, 3 * len(PROBES.all))
    checker = Checker(answers)
    send = checker.sends(server.send)
    for request in ASKED:
        assert (await send(request)).tokens == 4
    assert checker.result().right == len(ASKED)
    server.answers = lambda request: {"a": "base", "b": "noise"}[request.model]
    for request in ASKED:
        await send(request)
    found = checker.result()
    assert (found.answers, found.right, found.wrong, found.unclear) == (16, 8, 4, 4)
    assert found.wrong_by == {"base": 4}


async def test_a_stale_version_is_wrong() -> None:
    server = FakeServer(("a",))
    answers = await calm_pass(server, ("a",), ("/x", "/y"), PROBES, lambda: None)
    assert CALM_NAME not in server.contents
    await server.load_adapter("new", "/x")
    checker = Checker(answers, lambda model, sent, ended: {"/y"} if model == "new" else {model})
    send = checker.sends(server.send)
    await send(Request("new", PROBES.all[0].prompt, 4))
    assert checker.result().wrong_by == {"/x": 1}
    await server.load_adapter("new", "/y")
    await send(Request("new", PROBES.all[0].prompt, 4))
    assert (checker.result().right, checker.result().wrong) == (1, 1)


async def test_models_that_answer_alike_cannot_be_told_apart() -> None:
    server = FakeServer(("a", "b"))
    server.answers = lambda request: "the same"
    with pytest.raises(InvalidArgument, match="equal answers"):
        await calm_pass(server, ("a", "b"), (), PROBES, lambda: None)
    assert len(await calm_pass(server, ("a",), (), PROBES, lambda: None)) == 1
