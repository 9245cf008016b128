"""Churn: adapters appear and change while requests run, and nothing of it is left behind."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from preft_loadgen.errors import InvalidArgument
from preft_loadgen.measure.churn import PREFIX, Churn, churn_folders
from preft_loadgen.traffic.request import Request
from unit.loadgen.fake_server import FakeServer


async def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        await asyncio.sleep(0.002)


async def test_adapters_appear_and_change_and_are_removed() -> None:
    server = FakeServer()
    before = dict(server.contents)
    churn = Churn(server, ("a", "b"), ("/x", "/y", "/z"), 0.05)
    send = churn.sends(server.send)
    async with churn.running():
        assert (await send(Request("a", (1,), 1))).model == ""
        await until(lambda: len(churn.changes) >= 4)
        reply = await send(Request("a", (1,), 1))
        assert reply.model.startswith(PREFIX)
        assert (await send(Request("c", (1,), 1))).model == ""
        allowed = churn.contents(reply.model, reply.started, reply.ended)
        assert any(reply.text.startswith(content) for content in allowed)
    assert server.contents == before
    kinds = [(change.kind, change.name, change.folder) for change in churn.changes[:4]]
    assert kinds == [
        ("add", f"{PREFIX}0", "/x"),
        ("replace", f"{PREFIX}0", "/y"),
        ("add", f"{PREFIX}1", "/z"),
        ("replace", f"{PREFIX}1", "/x"),
    ]
    assert all(change.error is None and change.seconds > 0 for change in churn.changes)
    assert churn.contents("a", 0.0, 1.0) == {"a"}


async def test_which_versions_may_answer() -> None:
    server = FakeServer()
    churn = Churn(server, ("a",), ("/x", "/y"), 0.2)
    async with churn.running():
        await until(lambda: churn.changes)
        added = time.perf_counter()
        assert churn.contents(f"{PREFIX}0", added, added) == {"/x"}
        await until(lambda: len(churn.changes) == 2)
        now = time.perf_counter()
        assert churn.contents(f"{PREFIX}0", now, now) == {"/y"}
        assert churn.contents(f"{PREFIX}0", added, now) == {"/x", "/y"}  # a request across the change


async def test_a_failed_change_is_told_and_changes_no_traffic() -> None:
    server = FakeServer()
    churn = Churn(server, ("a",), ("/broken", "/broken"), 0.005)
    async with churn.running():
        await until(lambda: churn.changes)
        assert (await churn.sends(server.send)(Request("a", (1,), 1))).model == ""
    assert churn.changes[0].error == "400: it has no weights"


def test_folders(tmp_path: Path) -> None:
    for name, config in (("b", "adapter_config.json"), ("a", "reft_config.json"), ("c", "other.json")):
        (tmp_path / name).mkdir()
        (tmp_path / name / config).touch()
    assert [Path(folder).name for folder in churn_folders(tmp_path)] == ["a", "b"]
    with pytest.raises(InvalidArgument, match="at least two"):
        churn_folders(tmp_path / "a")
    with pytest.raises(InvalidArgument, match="can't be read"):
        churn_folders(tmp_path / "missing")
