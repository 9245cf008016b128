"""Background tasks of one owner: no task ends silently, and `close` ends them all.

Owns the tasks, the handling of their exceptions, and the log lines about these. Doesn't know the tasks' work.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from typing import Any

from preft.core.errors import PreftError

logger = logging.getLogger(__name__)

AGAIN_SECONDS = 1.0


async def cancelled(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancels the tasks and waits for their end.

    Cancels again what goes on: Python before 3.12 loses a cancellation that comes as `asyncio.wait_for` ends
    (python/cpython#86296).
    """
    while going := [task for task in tasks if not task.done()]:
        for task in going:
            task.cancel()
        await asyncio.wait(going, timeout=AGAIN_SECONDS)


class Background:
    """For one asyncio loop. The owner calls `close`."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Runs `work` once. Its exception is logged."""
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def every(self, pause: float | Callable[[], float], step: Callable[[], Awaitable[object]], name: str) -> None:
        """Runs `step` repeatedly until `close`, with `pause` seconds before each step.

        A step's exception is logged, and the next step runs all the same. If consecutive steps raise the same class of
        error, only the first is logged.
        """
        self.start(self._repeat(pause, step, name), name)

    async def close(self) -> None:
        """Cancels all tasks and waits for their end."""
        while self._tasks:  # one that ends may start another one
            await cancelled(self._tasks)
            await asyncio.sleep(0)  # for `_ended`

    async def finish(self, seconds: float) -> None:
        """Waits up to `seconds` for the tasks to end, then closes."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=seconds)
        await self.close()

    async def _repeat(
        self, pause: float | Callable[[], float], step: Callable[[], Awaitable[object]], name: str
    ) -> None:
        failing: type[BaseException] | None = None
        while True:
            await asyncio.sleep(pause() if callable(pause) else pause)
            try:
                await step()
            except (Exception, asyncio.CancelledError) as error:
                task = asyncio.current_task()
                if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
                    raise
                if isinstance(error, PreftError) and type(error) is not failing:
                    logger.warning("%s: %s", name, error)
                elif type(error) is not failing:
                    logger.error("%s: an unexpected error", name, exc_info=error)
                failing = type(error)
            else:
                if failing is not None:
                    logger.info("%s: it works again", name)
                failing = None

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("%s: an unexpected error ended it", task.get_name(), exc_info=error)
