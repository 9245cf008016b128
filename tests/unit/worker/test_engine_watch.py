"""Engines that hang, for a while or for ever, at work or idle."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass

import pytest

from preft.core.cluster import Role
from preft.core.errors import WorkerLost
from preft.core.request import Sampling, TokenDelta
from preft.engine.port import EngineRequest
from preft.memory.arena import StagingArena
from preft.worker.engine_watch import STALLED_SECONDS, EngineWatch
from support.fake_engine import FakeEngine, tokens_of
from support.worker_services import until

TIMEOUT = 1.0
LONG = 3600.0
REQUEST = EngineRequest("r", (5, 6, 7), Sampling(max_tokens=4, temperature=0.0))


class ProbedEngine(FakeEngine):
    """Counts its probes."""

    probes = 0

    async def between_steps(self) -> None:
        self.probes += 1
        await super().between_steps()


@dataclass(frozen=True)
class Watched:
    engine: ProbedEngine
    watch: EngineWatch
    task: asyncio.Task[None]


@asynccontextmanager
async def watched(timeout: float = TIMEOUT) -> AsyncIterator[Watched]:
    arena = StagingArena.create(8192)
    engine = ProbedEngine(Role.COLOCATED, arena.path)
    watch = EngineWatch(engine, timeout)
    task = asyncio.create_task(watch.run())
    try:
        yield Watched(engine, watch, task)
    finally:
        task.cancel()
        await asyncio.wait({task})
        await engine.close()
        arena.close()


async def collect(engine: FakeEngine, deltas: list[TokenDelta]) -> None:
    async with aclosing(engine.generate(REQUEST)) as stream:
        async for delta in stream:
            deltas.append(delta)


@pytest.mark.parametrize("is_idle", [True, False])
async def test_an_engine_that_hangs_is_killed(is_idle: bool) -> None:
    async with watched() as one:
        deltas: list[TokenDelta] = []
        one.engine.one_by_one = asyncio.Semaphore(2)
        running = None if is_idle else asyncio.create_task(collect(one.engine, deltas))
        await until(lambda: one.engine.probes > 3 and (is_idle or len(deltas) == 2))
        assert one.watch.stalled_seconds == 0
        began = time.monotonic()
        one.engine.answering.clear()
        await until(lambda: one.watch.stalled_seconds > 0)
        assert not one.task.done()
        async with asyncio.timeout(20):
            assert await one.engine.wait_dead() == "it hung, and was killed after 1 s without a step"
        assert time.monotonic() - began > 0.9 * TIMEOUT
        await asyncio.wait({one.task}, timeout=5)
        assert one.task.done()
        if running is not None:
            one.engine.one_by_one.release()
            with pytest.raises(WorkerLost, match="it hung"):
                await running
            assert len(deltas) == 2


async def test_an_engine_that_goes_on_in_time_lives(caplog: pytest.LogCaptureFixture) -> None:
    async with watched() as one:
        deltas: list[TokenDelta] = []
        for _ in range(3):  # silence isn't added up
            one.engine.answering.clear()
            running = asyncio.create_task(collect(one.engine, deltas))
            await until(lambda: one.watch.stalled_seconds > 0)
            one.engine.answering.set()
            await running
            await until(lambda: one.watch.stalled_seconds == 0)
        assert not one.task.done()
        tokens = [token for delta in deltas for token in delta.token_ids]
        assert tokens == 3 * tokens_of("", REQUEST.prompt_token_ids, REQUEST.sampling)
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(said) == 6
    assert said[0] == "the engine has made no step for 0.25 s: requests go to other workers, if any"
    assert said[1].startswith("the engine goes on after ")


async def test_time_for_which_the_worker_stood_still_is_not_silence() -> None:
    """As after SIGSTOP and SIGCONT, or on a machine that slept: the engine may have stood still too."""
    async with watched() as one:
        for _ in range(2):
            one.engine.answering.clear()
            await asyncio.sleep(0.1)
            time.sleep(2 * TIMEOUT)  # noqa: ASYNC251
            await asyncio.sleep(0)
            assert not one.task.done()
            one.engine.answering.set()
            before = one.engine.probes
            await until(lambda before=before: one.engine.probes > before)  # type: ignore[misc]
        assert not one.task.done()
        assert one.watch.stalled_seconds == 0


async def test_a_dead_engine_ends_the_watch() -> None:
    async with watched() as one:
        await until(lambda: one.engine.probes > 0)
        one.engine.die("killed by somebody")
        await until(one.task.done)
        assert await one.engine.wait_dead() == "killed by somebody"
        assert one.task.exception() is None


async def test_usual_steps_are_no_stall() -> None:
    async with watched(LONG) as one:
        told = []
        for silence in (0.0, STALLED_SECONDS - 0.1, STALLED_SECONDS, 70.5):
            one.watch._silence = silence
            told.append(one.watch.stalled_seconds)
        assert told == [0, 0, 5, 70]
