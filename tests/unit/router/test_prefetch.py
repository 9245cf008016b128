"""Calls that bring adapters in: one per worker and adapter, and what their ends are told as."""

from __future__ import annotations

import asyncio
import logging

import pytest
from preft.router.ledger import Ledger

from preft.core.cluster import Role, Worker, WorkerState
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
from support.readable_ref import ReadableRef

P0, P1 = (Worker(name, Role.PREFILL, WorkerState.READY, "h:1", "f", 1) for name in ("p0", "p1"))
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
        self.channels, self.ledger = Channels(), Ledger()
        self.ends: list[tuple[str, PreftError | None]] = []
        self.prefetcher = Prefetcher(self.channels, self.ledger, 7.0, self.end)  # type: ignore[arg-type]

    def end(self, digest: str, error: PreftError | None) -> None:
        assert not self.ledger.loading("p0", digest)  # whoever looks now may ask again
        self.ends.append((digest, error))

    async def begin(self, worker: Worker, adapter: AdapterRef) -> None:
        self.prefetcher.want(worker, adapter)
        await asyncio.sleep(0)


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_one_call_per_worker_and_adapter() -> None:
    loads = Loads()
    for _ in range(3):
        for worker in (P0, P1):
            for adapter in (ADA, BOB):
                loads.prefetcher.want(worker, adapter)
                assert loads.ledger.loading(worker.id, adapter.digest)  # at once
    await settle()
    assert sorted(loads.channels.calls) == [(w, a, 7.0) for w in ("p0", "p1") for a in ("ada", "bob")]
    loads.channels.ends["p0", "ada"].set_result(None)
    await settle()
    assert loads.ends == [("ada-digest", None)]
    assert loads.ledger.loaded("p0", "ada-digest")
    assert not loads.ledger.loaded("p1", "ada-digest")
    assert loads.ledger.loading("p1", "ada-digest")
    await loads.begin(P0, ADA)  # it was evicted meanwhile
    assert len(loads.channels.calls) == 5
    await loads.prefetcher.close()


@pytest.mark.parametrize("error", [InvalidAdapter("broken"), SourceNotFound("no such folder"), Unavailable("no room")])
async def test_a_refusal_is_passed_on(error: PreftError) -> None:
    loads = Loads()
    await loads.begin(P0, ADA)
    loads.channels.ends["p0", "ada"].set_exception(error)
    await settle()
    assert loads.ends == [("ada-digest", error)]
    assert not loads.ledger.loaded("p0", "ada-digest")
    assert loads.ledger.refused("p0", "ada-digest")


async def test_a_lost_worker_is_nobodys_error() -> None:
    loads = Loads()
    await loads.begin(P0, ADA)
    loads.channels.ends["p0", "ada"].set_exception(WorkerLost("gone"))
    await settle()
    assert loads.ends == [("ada-digest", None)]
    assert not loads.ledger.loaded("p0", "ada-digest")
    assert not loads.ledger.loading("p0", "ada-digest")


async def test_a_bug_ends_the_waiting_too(caplog: pytest.LogCaptureFixture) -> None:
    loads = Loads()
    await loads.begin(P0, ADA)
    with caplog.at_level(logging.CRITICAL):
        loads.channels.ends["p0", "ada"].set_exception(ValueError("a bug"))
        await settle()
    [(digest, error)] = loads.ends
    assert digest == "ada-digest"
    assert isinstance(error, EngineFailed)


async def test_closing_ends_all_calls() -> None:
    loads = Loads()
    await loads.begin(P0, ADA)
    await loads.begin(P1, BOB)
    await loads.prefetcher.close()
    assert all(end.cancelled() for end in loads.channels.ends.values())
    assert loads.ends == []
    assert not loads.ledger.loading("p0", "ada-digest")
