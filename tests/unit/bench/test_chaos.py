"""`make chaos` sees every kind of bad answer, and what isn't given back. A small server invents the answers."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from bench.chaos import burst, churn
from bench.chaos.__main__ import all_faults, figures_table, is_good
from bench.chaos.cluster import ChaosCluster
from bench.chaos.faults import Fault, kill_redis
from bench.chaos.load import AnswerFailed, Load, make_cases
from bench.chaos.namespaces import Network, missing
from bench.chaos.resources import held, more_than
from bench.chaos.wrong_clock import clock_ahead
from preft.core.errors import PreftError

RIGHT = [7, 8, 9]


class Answers:
    """A gateway whose next answers are given."""

    def __init__(self) -> None:
        self.next: list[str] = []
        self.url = ""
        self.swap = "alice"  # the version that the changing adapter has; "" while it is away

    async def adapter(self, request: web.Request) -> web.Response:
        """The changing adapter is added or removed."""
        version = "" if request.method == "DELETE" else (await request.json())["source"].rpartition("/")[2]
        self.swap = version or self.swap
        return web.json_response({})

    async def complete(self, request: web.Request) -> web.StreamResponse:
        model = (await request.json())["model"]
        kind = self.next.pop(0) if self.next else "right"
        if kind == "slow":
            await asyncio.sleep(60)
        if kind == "missing":
            return web.json_response({"error": {"message": "no such adapter"}}, status=404)
        if kind == "refused":
            return web.json_response({"error": {"message": "no workers"}}, status=503)
        reply = web.StreamResponse()
        await reply.prepare(request)
        own = {"alice": [1], "bruno": [2], "base": [3], "swap": [{"alice": 1, "bruno": 2}[self.swap]]}.get(model, RIGHT)
        tokens = {
            "own": own,
            "base": [3],
            "other": [7, 8, 1],
            "long": [*RIGHT, 9],
            "short": RIGHT[:2],
            "cut": RIGHT[:1],
        }.get(kind, RIGHT)
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
    app.router.add_post("/v1/adapters", answers.adapter)
    app.router.add_delete("/v1/adapters/swap", answers.adapter)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
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


def test_names_of_faults_are_unique() -> None:
    names = [fault.name for fault in all_faults(1.0)]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("key", ["failed", "cut", "wrong", "duplicated", "missing", "left"])
def test_a_fault_is_good_only_without_a_trace(key: str) -> None:
    figures: dict[str, Any] = {"sent": 9, "failed": 0, "cut": 0, "wrong": 0, "duplicated": 0, "missing": 0}
    figures |= {"recovery_s": 1.0, "left": {}, "errors": []}
    assert is_good(Fault("x", kill_redis), figures)
    figures[key] = {"running": 1} if key == "left" else 1
    assert not is_good(Fault("x", kill_redis), figures)
    assert is_good(Fault("x", kill_redis, may_cut=True), figures) is (key == "cut")
    assert "running" in figures_table({"x": figures}) or key != "left"


async def test_a_client_that_gives_up_is_no_failure(answers: Answers) -> None:
    load = Load([answers.url], make_cases(["base"], 100, seed=0)[:1])
    answers.next = ["slow"]
    async with aiohttp.ClientSession() as session:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await load.one(session, 0)
    assert (load.counts.sent, load.counts.cancelled, load.counts.failed, load.counts.wrong) == (1, 1, 0, 0)


async def test_the_burst_is_compared_with_the_cluster_at_rest(
    answers: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(burst, "REQUESTS", 5)
    sent = burst.Burst(100)
    answers.next = ["right", "other", "refused", "long", "right"]
    await sent.send(answers.url)
    figures = await sent.figures([answers.url])
    assert {key: figures[key] for key in ("sent", "failed", "wrong", "duplicated", "missing")} == {
        "sent": 5, "failed": 1, "wrong": 2, "duplicated": 1, "missing": 0,
    }  # fmt: skip


class Kept(ChaosCluster):
    """A cluster whose workers are never killed."""

    def __init__(self) -> None:
        self.start_figures = {}

    async def workers(self) -> list[dict[str, Any]]:
        return []


@pytest.mark.parametrize(
    ("kinds", "counts"),
    [
        (["own"], {}),
        (["missing"], {"absent": 1}),
        (["refused"], {"failed": 1}),
        (["other"], {"wrong": 1}),
        (["base"], {"wrong": 1}),
    ],
)
async def test_the_changing_adapter_answers_with_one_of_its_versions(
    answers: Answers, kinds: list[str], counts: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("REQUESTS", 1), ("SWAPPED", 1.0), ("CANCELLED", 0.0), ("PROMPTS", 1)):
        monkeypatch.setattr(churn, name, value)
    load = Load([answers.url], make_cases(["base"], 100, seed=0)[:1])
    answers.next = ["own"] * 3 + kinds
    tested = churn.Churn(Kept(), load, 100)
    assert (await tested.run())["answers_404"] == counts.pop("absent", 0)
    got = load.counts.as_json()
    assert {key: got[key] for key in ("failed", "wrong") if got[key]} == counts


async def test_a_prompt_must_tell_the_models_apart(answers: Answers) -> None:
    load = Load([answers.url], make_cases(["base"], 100, seed=0)[:1])
    with pytest.raises(PreftError, match="apart"):
        await churn.Churn(Kept(), load, 100).run()


def test_more_than_before_is_told() -> None:
    before = {"processes": 5, "descriptors": 100, "unfinished_copies": 0, "abandoned_shared_memory": 0}
    assert more_than(before, before) == {}
    assert more_than(before, {**before, "processes": 4, "descriptors": 120}) == {}
    now = {"processes": 6, "descriptors": 126, "unfinished_copies": 1, "abandoned_shared_memory": 1}
    assert more_than(before, now) == {
        "processes": "5 -> 6",
        "descriptors": "100 -> 126",
        "unfinished_copies": "0 -> 1",
        "abandoned_shared_memory": "0 -> 1",
    }


def test_what_is_held_is_counted(tmp_path: Path) -> None:
    mark = "TEST_CHAOS_MARK=one"
    before = held(mark, [os.getpid()], tmp_path)
    (tmp_path / "adapters" / ".unfinished-x-1").mkdir(parents=True)
    marked = dict([mark.split("=")])
    with open("/dev/null") as _, subprocess.Popen(["sleep", "60"], env={**os.environ, **marked}) as process:
        now = held(mark, [os.getpid()], tmp_path)
        process.kill()
    assert before["processes"] == 0
    assert now["processes"] == 1
    assert now["descriptors"] > before["descriptors"]
    assert (before["unfinished_copies"], now["unfinished_copies"]) == (0, 1)


CLOCKS = """
import queue, time, threading
before = time.monotonic(), time.time()
time.sleep(0.05)
threading.Lock().acquire(timeout=0.05) and threading.Event().wait(0.05)
try:
    queue.Queue().get(timeout=0.05)
except queue.Empty:
    print(time.time(), time.monotonic() - before[0], time.time() - before[1])
"""


def test_a_wrong_clock_is_ahead_and_as_fast(tmp_path: Path) -> None:
    environment = {**os.environ, **clock_ahead(600, tmp_path)}
    ran = subprocess.run([sys.executable, "-c", CLOCKS], env=environment, capture_output=True, text=True, check=True)
    now, steady, shown = map(float, ran.stdout.split())
    assert now - time.time() == pytest.approx(600, abs=30)
    assert steady == pytest.approx(shown, abs=0.5)
    assert steady < 30


@pytest.mark.long
@pytest.mark.skipif(missing() is not None, reason="network namespaces need root, ip, tc and iptables")
def test_links_are_slow_cut_and_healed() -> None:
    network = Network(1)
    link, receiver = network.links[0], network.decode[0]
    listen = "import socket; s = socket.create_server(('', 5555)); print(flush=True)\nwhile True: s.accept()[0].recv(1)"
    connect = f"import socket; socket.create_connection(('{receiver.host}', 5555), 2).close()"
    try:
        with subprocess.Popen(receiver.command(sys.executable, "-c", listen), stdout=subprocess.PIPE) as server:
            assert server.stdout is not None
            server.stdout.readline()
            try:
                network.prefill.run(sys.executable, "-c", connect)
                link.lose(1.0)
                with pytest.raises(PreftError, match="timed out"):
                    network.prefill.run(sys.executable, "-c", connect)
                subprocess.run([sys.executable, "-c", connect], check=True)  # the machine itself isn't cut off
                link.heal()
                link.slow_down(100_000)
                assert link.under_way() == 0
                assert "rate 800Kbit" in network.prefill.run("tc", "qdisc", "show", "dev", link.ends[0][1])
                link.heal()
                network.prefill.run(sys.executable, "-c", connect)
            finally:
                server.kill()
    finally:
        network.close()
