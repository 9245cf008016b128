"""A sweep: which models are asked, in which order, what it refuses; traces, churn, verification."""

from __future__ import annotations

from collections import Counter

import pytest

from preft_loadgen.errors import InvalidArgument, RequestFailed
from preft_loadgen.measure.sweep import (
    WARM_UP,
    Churning,
    ClosedLoop,
    Load,
    Population,
    Replay,
    population,
    run_sweep,
)
from preft_loadgen.report.slo import Slo
from preft_loadgen.traffic.arrivals import OpenLoop
from preft_loadgen.traffic.lengths import Lengths
from preft_loadgen.traffic.prompts import RandomPrompts
from preft_loadgen.traffic.request import Request
from preft_loadgen.traffic.trace import Row
from preft_loadgen.transport.server import Models
from unit.loadgen.fake_server import FakeServer

PROMPTS = RandomPrompts(Lengths(3, 3), Lengths(4, 4))
LOAD = Load(8, PROMPTS, ClosedLoop(2))


async def test_each_count_asks_its_adapters_evenly_after_a_warm_up() -> None:
    server = FakeServer()
    found = await run_sweep(server, LOAD, [0, 1, 4], await population(server))
    assert [(one.summary.adapters, one.summary.requests, one.summary.tokens) for one in found] == [
        *((0, 8, 32), (1, 8, 32), (4, 8, 32))
    ]
    measured = Counter(request.model for request in server.requests if request.output_tokens == 4)
    warmed = Counter(request.model for request in server.requests if request.output_tokens == WARM_UP.low)
    assert measured == {"base": 8, "a": 8 + 2, "b": 2, "c": 2, "d": 2}
    assert warmed == {"base": 1, "a": 2, "b": 1, "c": 1, "d": 1}
    assert len({request.prompt for request in server.requests if request.output_tokens == 4}) > 20


async def test_without_warm_up_and_with_cold_adapters() -> None:
    server = FakeServer(("a", "b"))
    (found,) = await run_sweep(server, Load(8, PROMPTS, ClosedLoop(2), warm_up=False), [2], await population(server))
    assert len(server.requests) == 8
    assert found.summary.cold is not None
    assert found.summary.cold.adapters == 2
    assert [one.model for one in found.summary.by_adapter] == ["a", "b"]


async def test_an_open_loop_sweep() -> None:
    server = FakeServer()
    load = Load(10, PROMPTS, OpenLoop(300), slo=Slo(ttft=5.0))
    (found,) = await run_sweep(server, load, [2], await population(server))
    assert (found.summary.requests, found.summary.errors) == (10, 0)
    assert found.summary.rate is not None
    assert found.summary.rate.planned == pytest.approx(300, rel=0.9)
    assert found.summary.goodput is not None
    assert found.summary.goodput.share == 1.0


async def test_a_trace() -> None:
    server = FakeServer()
    rows = (Row(0.0, 600, 3, (1,), "d"), Row(0.01, 5, 2), Row(0.02, 7, 1, (), 1))
    (found,) = await run_sweep(server, Load(1, PROMPTS, Replay(rows), warm_up=False), [2], await population(server))
    asked = [(request.model, len(request.ids), request.output_tokens) for request in server.requests]
    assert (asked[0], asked[2]) == (("d", 600, 3), ("b", 7, 1))
    assert found.summary.tokens == 6


async def test_churn_and_verification_together() -> None:
    server = FakeServer(seconds=0.01)
    load = Load(200, PROMPTS, ClosedLoop(8), churn=Churning(0.02, ("/x", "/y")), verify=True)
    found = await run_sweep(server, load, [0, 4], await population(server))
    assert found[0].changes == ()
    assert {change.kind for change in found[1].changes} == {"add", "replace"}
    for one in found:
        assert one.summary.verify is not None
        assert (one.summary.verify.wrong, one.summary.verify.unclear, one.summary.errors) == (0, 0, 0)
        assert one.summary.verify.right == 200
    assert any(one.model.startswith("loadgen-churn-") for one in found[1].summary.by_adapter)


async def test_a_server_that_confuses_adapters_under_load_is_found_out() -> None:
    server = FakeServer(seconds=0.005)

    def confused(request: Request) -> str:
        return server.contents["c" if request.model == "b" and server.running > 1 else request.model]

    server.answers = confused
    (found,) = await run_sweep(server, Load(16, PROMPTS, ClosedLoop(8), verify=True), [4], await population(server))
    assert found.summary.verify is not None
    assert found.summary.verify.wrong_by == {"c": found.summary.verify.wrong}
    assert found.summary.verify.wrong >= 2
    assert found.summary.verify.unclear == 0


async def test_names_come_from_the_user_or_from_the_server() -> None:
    server = FakeServer()
    assert await population(server) == Population("base", ("a", "b", "c", "d"))
    assert await population(server, ("c", "x")) == Population("base", ("c", "x"))
    assert await population(server, base="other") == Population("other", ("a", "b", "c", "d"))
    assert await population(server, ("c",), "other") == Population("other", ("c",))

    class Unlisted(FakeServer):
        async def models(self) -> Models:
            raise RequestFailed("404: no such page", 404)

    assert await population(Unlisted(), ("c",)) == Population(None, ("c",))
    with pytest.raises(RequestFailed):
        await population(Unlisted())


async def test_what_cannot_be_measured() -> None:
    server = FakeServer()
    with pytest.raises(InvalidArgument, match="8 adapters were asked for, the server has 4"):
        await run_sweep(server, LOAD, [1, 8], await population(server))
    with pytest.raises(InvalidArgument, match="--model"):
        await run_sweep(server, LOAD, [0], Population(None, ("a",)))
    assert server.requests == []
    for wrong in (
        lambda: ClosedLoop(0),
        lambda: Churning(0.0, ("/x", "/y")),
        lambda: Churning(float("nan"), ("/x", "/y")),
        lambda: Load(1, PROMPTS, Replay((Row(0, 1, 1),)), verify=True),
        lambda: Load(1, PROMPTS, turns=Lengths(2, 2), verify=True),
    ):
        with pytest.raises(InvalidArgument):
            wrong()
