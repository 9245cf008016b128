"""Background tasks: whatever a step raises, it is said, and the next step comes; closing ends everything."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator

import pytest

from preft.core import background as background_module
from preft.core.background import Background
from preft.core.errors import Unavailable


@pytest.fixture
async def background() -> AsyncIterator[Background]:
    background = Background()
    yield background
    await background.close()


class Steps:
    """Raises its errors one after the other, then nothing."""

    def __init__(self, *errors: BaseException) -> None:
        self._errors = list(errors)
        self.good = asyncio.Event()

    async def __call__(self) -> None:
        await asyncio.sleep(0)
        if self._errors:
            raise self._errors.pop(0)
        self.good.set()


@pytest.mark.parametrize("error", [KeyError("x"), Unavailable("x"), asyncio.CancelledError(), RuntimeError("x")])
async def test_no_error_ends_what_is_repeated(
    background: Background, caplog: pytest.LogCaptureFixture, error: BaseException
) -> None:
    caplog.set_level(logging.INFO)
    steps = Steps(error, error)
    background.every(0.001, steps, "the heartbeat")
    await asyncio.wait_for(steps.good.wait(), 5)
    told = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert [record.getMessage().partition(":")[0] for record in told] == ["the heartbeat"]  # once, not each time
    assert "the heartbeat: it works again" in caplog.text


async def test_another_error_is_said_too(background: Background, caplog: pytest.LogCaptureFixture) -> None:
    steps = Steps(Unavailable("the disk is full"), KeyError("a bug"), Unavailable("the disk is full"))
    background.every(lambda: 0.001, steps, "the heartbeat")
    await asyncio.wait_for(steps.good.wait(), 5)
    assert [record.levelname for record in caplog.records] == ["WARNING", "ERROR", "WARNING"]


async def test_an_error_of_a_task_is_said(background: Background, caplog: pytest.LogCaptureFixture) -> None:
    task = background.start(Steps(KeyError("a bug"))(), "the load of 'ada'")
    await asyncio.wait({task})
    await asyncio.sleep(0)
    assert "the load of 'ada': an unexpected error ended it" in caplog.text
    assert "KeyError: 'a bug'" in caplog.text


async def test_closing_ends_everything(caplog: pytest.LogCaptureFixture) -> None:
    background, before = Background(), asyncio.all_tasks()
    background.every(3600, Steps(), "sleeps")
    background.start(asyncio.sleep(3600), "sleeps too")
    background.start(asyncio.sleep(0), "ends")
    await background.close()
    assert asyncio.all_tasks() == before
    assert caplog.records == []


async def test_a_task_that_a_closing_task_starts_is_ended_too() -> None:
    background, before = Background(), asyncio.all_tasks()

    async def last_wish() -> None:
        try:
            await asyncio.sleep(3600)
        finally:
            background.start(asyncio.sleep(3600), "late")

    background.start(last_wish(), "early")
    await asyncio.sleep(0)
    await background.close()
    assert asyncio.all_tasks() == before


async def test_a_cancellation_that_gets_lost_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background_module, "AGAIN_SECONDS", 0.01)
    background, lost = Background(), 0

    async def forgets() -> None:
        nonlocal lost
        while True:
            try:
                await asyncio.sleep(3600)
            except asyncio.CancelledError:
                lost += 1
                if lost > 2:
                    raise

    background.start(forgets(), "it")
    await asyncio.sleep(0)
    async with asyncio.timeout(5):
        await background.close()
    assert lost == 3


async def test_finishing_waits_for_what_ends_soon() -> None:
    background, done = Background(), asyncio.Event()

    async def work() -> None:
        await asyncio.sleep(0.01)
        done.set()

    background.start(work(), "soon")
    never = background.start(asyncio.sleep(3600), "never")
    await background.finish(0.1)
    assert done.is_set()
    assert never.cancelled()
