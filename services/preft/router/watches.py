"""Follows the status stream of every registered worker, and keeps the view up to date.

This module owns one task per worker with an address. A worker counts as alive while its stream brings a message at
least every `timeout` seconds. A broken or silent stream is opened again, and its first message makes the worker alive
again: no clock of another machine is read.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Set
from contextlib import aclosing, suppress

from preft.core.background import Background
from preft.core.cluster import Worker, WorkerState
from preft.core.errors import EngineFailed, PreftError, WorkerLost
from preft.router.channels import Wants, WorkerChannels
from preft.router.view import ClusterView
from preft.router.worker_view import Order, WorkerView

logger = logging.getLogger(__name__)

MESSAGES = 4000  # a second, of all workers together, but for news of adapters: as far as the router's asking decides it
INTERVALS = (0.1, 1.0)  # seconds, least and most, between two messages of one worker; news of adapters comes sooner
WANTS_SECONDS = 0.2  # at least, between two messages to one worker
REPEAT_SECONDS = 1.0
MOST_WANTED = 2000  # adapters that a worker is told of; it takes 10,000
MOST_WAIT = 3600.0  # seconds that are told
RETRY_SECONDS = (0.1, 1.0)  # between two attempts to open a stream: after the first failure, and at most


class Watches:
    """Use it inside one event loop; `close` ends all streams."""

    def __init__(
        self, channels: WorkerChannels, view: ClusterView, timeout: float, on_news: Callable[[WorkerView, bool], None]
    ) -> None:
        """`on_news` is called after each message or loss, with whether the worker came or went by it.

        A worker whose engine stalls has gone, too, in this sense.
        """
        self._channels = channels
        self._view = view
        self._timeout = timeout
        self._on_news = on_news
        self._tasks: dict[str, tuple[Worker, asyncio.Task[None]]] = {}
        self._firsts: dict[str, asyncio.Event] = {}  # set by the first message or failure; removed then
        self._background = Background()

    def follow(self) -> None:
        """Begins to watch new workers, and leaves those that aren't registered any more."""
        for worker_id, (worker, task) in list(self._tasks.items()):
            view = self._view.workers.get(worker_id)
            if view is None or view.worker != worker:
                task.cancel()
                del self._tasks[worker_id]
        for view in self._view.workers.values():
            if view.worker.address and view.id not in self._tasks:
                self._begin(view)

    async def settled(self, seconds: float) -> None:
        """Waits until every watched worker has told once or failed to, at most `seconds`."""
        firsts = [asyncio.ensure_future(first.wait()) for first in self._firsts.values()]
        if firsts:
            _, late = await asyncio.wait(firsts, timeout=seconds)
            for wait in late:
                wait.cancel()

    def lost(self, worker: Worker) -> None:
        """A call to `worker` broke: it is alive again once a new stream has brought a message."""
        watched, task = self._tasks.get(worker.id, (None, None))
        view = self._view.workers.get(worker.id)
        if view is None or view.worker != worker or watched != worker or task is None or view.status is None:
            return
        task.cancel()
        self._silent(view)
        self._begin(view)

    async def close(self) -> None:
        await self._background.close()

    def _begin(self, view: WorkerView) -> None:
        self._firsts[view.id] = asyncio.Event()
        task = self._background.start(self._watch(view), f"the status stream of {view.id}")
        self._tasks[view.id] = (view.worker, task)

    async def _watch(self, view: WorkerView) -> None:
        least, most = RETRY_SECONDS
        pause = least
        is_said = False
        while True:
            try:
                interval = self._interval()
                wants = _wants(view, max(WANTS_SECONDS, interval))
                watch = self._channels.watch(view.worker, interval, self._timeout, wants)
                async with aclosing(watch) as updates:
                    async for update in updates:
                        pause, is_said = least, False
                        was = view.is_ready, view.is_stalled
                        view.told(update, asyncio.get_running_loop().time())
                        self._first_of(view)
                        self._tell(view, (view.is_ready, view.is_stalled) != was)
                reason: PreftError = WorkerLost(f"worker {view.id} ended its status stream")
            except PreftError as error:
                reason = error
            except Exception:
                logger.exception("the status stream of %s broke", view.id)
                reason = EngineFailed("an internal error ended its status stream")
            if not is_said:
                level = logging.INFO if view.state is WorkerState.DRAINING else logging.WARNING
                logger.log(level, "worker %s gets no requests: %s", view.id, reason)
                is_said = True
            if view.status is not None:
                self._silent(view)
            self._first_of(view)
            await asyncio.sleep(pause)
            pause = min(most, 2 * pause)

    def _first_of(self, view: WorkerView) -> None:
        if first := self._firsts.pop(view.id, None):
            first.set()

    def _silent(self, view: WorkerView) -> None:
        view.lost(asyncio.get_running_loop().time())
        self._tell(view, True)

    def _tell(self, view: WorkerView, came_or_went: bool) -> None:
        try:
            self._on_news(view, came_or_went)
        except Exception:  # the stream has nothing to do with it
            logger.exception("news of %s broke the owner of its stream", view.id)

    def _interval(self) -> float:
        least, most = INTERVALS
        return min(most, max(least, len(self._view.workers) / MESSAGES))


async def _wants(view: WorkerView, interval: float) -> AsyncIterator[Wants]:
    """What changes in the router's wants of one worker, at most once per `interval` seconds.

    A wait for a slot is told again each second, so that the worker doesn't believe a router that hangs.
    """
    clock = asyncio.get_running_loop().time
    told: tuple[Set[str], Order | None] = frozenset(), None
    told_at = clock()
    while True:
        view.wants_changed.clear()
        now = frozenset(view.wanted[:MOST_WANTED]), view.slot_for
        repeat = told_at + REPEAT_SECONDS if view.slot_for else None
        if now != told or (repeat is not None and clock() >= repeat):
            (wanted, oldest), (before, _) = now, told
            waited = clock() - oldest[0] if oldest else 0.0
            yield Wants(wanted - before, before - wanted, int(1000 * min(MOST_WAIT, max(0.0, waited))))
            told, told_at = now, clock()
            await asyncio.sleep(interval)
        else:
            with suppress(TimeoutError):
                async with asyncio.timeout_at(repeat):
                    await view.wants_changed.wait()
