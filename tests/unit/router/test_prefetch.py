"""Calls that bring adapters in: one per worker and adapter, and what their ends are told as."""

from __future__ import annotations

import asyncio
import logging

import pytest

from preft.core.cluster import Worker
from preft.core.errors import (
    EngineFailed,
    InvalidAdapter,
    PreftError,
    SourceNotFound,
    Unavailable,
    WorkerLost,
)
from preft.core.request import AdapterRef
from preft.router.prefetch import Prefetcher
from preft.router.worker_view import WorkerView
from support.invented_cluster import p, view_of
from support.readable_ref import ReadableRef

ADA, BOB = (ReadableRef(name, f"{name}-digest", "/") for name in ("ada", "bob"))


class Channels:
    """Calls that end when the test says so."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str, float]] = []
        self.ends: dict[tuple[str, str], asyncio.Future[None]] = {}

    async def prefetch(self, worker: Worker, adapter: AdapterRef, timeout: float) -> None:
        self.calls.append((worker.id, adapter.name, timeout))
        end = self.ends[worker.id, adapter.name] = asyncio.get_running_loop().create_future()
        await end


class Loads:
    """A prefetcher, and the ends that it told of."""

    def __init__(self) -> None:
        self.channels = Channels()
        self.view = view_of(p("p0"), p("p1"))
        self.p0, self.p1 = self.view.workers.values()
        self.ends: list[tuple[str, str, PreftError | None]] = []
        self.prefetcher = Prefetcher(self.channels, 7.0, self.end)  # type: ignore[arg-type]

    def end(self, worker: WorkerView, digest: str, error: PreftError | None) -> None:
        assert not worker.is_loading(digest)  # the load may be asked for again from now on
        self.ends.append((worker.id, digest, error))

    async def begin(self, worker: WorkerView, adapter: AdapterRef) -> None:
        self.prefetcher.want(worker, adapter)
        await asyncio.sleep(0)


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_one_call_per_worker_and_adapter() -> None:
    loads = Loads()
    for _ in range(3):
        for worker in (loads.p0, loads.p1):
            for adapter in (ADA, BOB):
                loads.prefetcher.want(worker, adapter)
                assert worker.is_loading(adapter.digest)  # at once
    await settle()
    assert sorted(loads.channels.calls) == [(w, a, 7.0) for w in ("p0", "p1") for a in ("ada", "bob")]
    loads.channels.ends["p0", "ada"].set_result(None)
    await settle()
    assert loads.ends == [("p0", "ada-digest", None)]
    assert loads.p0.holds("ada-digest")
    assert not loads.p1.holds("ada-digest")
    assert loads.p1.is_loading("ada-digest")
    await loads.begin(loads.p0, ADA)  # it was evicted meanwhile
    assert len(loads.channels.calls) == 5
    await loads.prefetcher.close()


@pytest.mark.parametrize("error", [InvalidAdapter("broken"), SourceNotFound("no such folder"), Unavailable("no room")])
async def test_a_refusal_is_passed_on(error: PreftError) -> None:
    loads = Loads()
    await loads.begin(loads.p0, ADA)
    loads.channels.ends["p0", "ada"].set_exception(error)
    await settle()
    assert loads.ends == [("p0", "ada-digest", error)]
    assert not loads.p0.holds("ada-digest")
    assert loads.p0.refused("ada-digest", asyncio.get_running_loop().time())


async def test_a_lost_worker_is_nobodys_error() -> None:
    loads = Loads()
    await loads.begin(loads.p0, ADA)
    loads.channels.ends["p0", "ada"].set_exception(WorkerLost("gone"))
    await settle()
    assert loads.ends == [("p0", "ada-digest", None)]
    assert not loads.p0.holds("ada-digest")
    assert not loads.p0.is_loading("ada-digest")


async def test_a_bug_ends_the_waiting_too(caplog: pytest.LogCaptureFixture) -> None:
    loads = Loads()
    await loads.begin(loads.p0, ADA)
    with caplog.at_level(logging.CRITICAL):
        loads.channels.ends["p0", "ada"].set_exception(ValueError("a bug"))
        await settle()
    [(_, digest, error)] = loads.ends
    assert digest == "ada-digest"
    assert isinstance(error, EngineFailed)


async def test_closing_ends_all_calls() -> None:
    loads = Loads()
    await loads.begin(loads.p0, ADA)
    await loads.begin(loads.p1, BOB)
    await loads.prefetcher.close()
    assert all(end.cancelled() for end in loads.channels.ends.values())
    assert loads.ends == []
    assert loads.view.loaders == {}
    assert not loads.p0.is_loading("ada-digest")
