"""The `WorkerStatus` service: tells each watching router what the worker does, first as a whole, then what changed.

Owns the open streams and the digests that changed since the last message of each. `Usage` and `AdapterStore` own the
truth, and report changes of it here, so that no message needs a look at all adapters.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, nullcontext, suppress
from dataclasses import dataclass, field, replace
from itertools import islice

import grpc.aio

from preft.adapters.sources.peers import Peers
from preft.adapters.store.adapter_store import AdapterStore
from preft.core.background import cancelled
from preft.core.cluster import AdapterStatus, StatusUpdate, WorkerStatus
from preft.rpc import workers_pb2, workers_pb2_grpc
from preft.rpc.caller import caller_of
from preft.rpc.checked import address_of, count_of, digest_of, number_of
from preft.rpc.convert import status_to_proto
from preft.rpc.status import errors_reported
from preft.worker.usage import Usage

LEAST_INTERVAL, MOST_INTERVAL = 0.01, 10.0  # seconds between two messages
SIGN_OF_LIFE = 1.0  # seconds without a message, unless the interval is longer
SOON = 0.2  # share of the interval after which changes of adapters and of their prompts come
MEASURE_SECONDS = 0.02  # for so long, all streams use the same measurement
WAIT_VALID = 3.0  # seconds after which a caller that hasn't said again that it waits for a slot may hang
MOST_WAIT_MS = 3_600_000
MOST_ADAPTERS = 10_000  # in one message of some 400 kB; the next message has the others


@dataclass(slots=True, eq=False)
class _Watcher:
    """One open stream."""

    caller: str
    news: asyncio.Event = field(default_factory=asyncio.Event)
    drains: asyncio.Event = field(default_factory=asyncio.Event)  # the drain has begun
    changed: set[str] = field(default_factory=set)  # digests
    is_behind: bool = True  # the next message is a whole one
    knows_draining: bool = False
    wanted: set[str] = field(default_factory=set)  # digests of adapters for which the caller's requests wait
    slot_since: float = math.inf  # monotonic time since which the oldest of them waits for a slot, ...
    slot_told: float = -math.inf  # ... as told at this time


class StatusService(workers_pb2_grpc.WorkerStatusServicer):
    """The gRPC service of one worker of any role. Use it inside one asyncio loop."""

    def __init__(
        self,
        measure: Callable[[], WorkerStatus],
        usage: Usage,
        adapters: AdapterStore | None,
        peers: Peers | None = None,
    ) -> None:
        """`measure` gives the worker's own figures; the streams call it at most once in MEASURE_SECONDS.

        `draining` and the `other_` counts are added here. Becomes the observer of `usage` and `adapters`, and tells
        `peers` of the watching gateways.
        """
        self._measure = measure
        self._measured = WorkerStatus()
        self._measured_at = -math.inf  # loop time
        self._usage = usage
        self._adapters = adapters
        self._peers = peers
        self._watchers: set[_Watcher] = set()
        self._draining = False
        self._spared: str | None = None  # the caller that isn't told of the drain
        self._told = asyncio.Event()  # a stream's reader has taken a message
        usage.observe(self._changed)
        if adapters is not None:
            adapters.observe(self._changed)

    async def Watch(
        self, requests: AsyncIterator[workers_pb2.WatchRequest], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[workers_pb2.StatusUpdate]:
        async with errors_reported(context):
            request = await anext(requests, workers_pb2.WatchRequest())
            interval = number_of(request.interval, "interval", LEAST_INTERVAL, MOST_INTERVAL)
            watcher = _Watcher(caller_of(context))
            address = address_of(request.content_address) if request.content_address else ""
            self._watchers.add(watcher)
            reading = asyncio.create_task(self._read(watcher, requests), name=f"the wants of {watcher.caller}")
            try:
                self._want(watcher, request)
                with self._peers.gateway(address) if self._peers is not None and address else nullcontext():
                    async with aclosing(self._messages(watcher, interval)) as messages:
                        async for message in messages:
                            yield message
                            if reading.done():
                                reading.result()
            finally:
                self._watchers.discard(watcher)
                self._told.set()
                if self._adapters is not None:
                    self._adapters.unwant(watcher.wanted)
                    watcher.wanted = set()
                await cancelled([reading])
                if not reading.cancelled():
                    reading.exception()  # has ended this stream already, or doesn't matter any more

    def drain(self, but: str | None = None) -> None:
        """Tells all streams at once, without waiting for their intervals, that the worker takes no more requests.

        The streams of the caller `but` aren't told until the next call.
        """
        self._spared = but
        self._draining = True
        for watcher in self._watchers:
            watcher.news.set()
            watcher.drains.set()

    async def drained(self, timeout: float) -> None:
        """Waits, `timeout` seconds at most, until the readers of all streams have taken what `drain` tells."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                while not all(watcher.knows_draining for watcher in self._watchers):
                    self._told.clear()
                    await self._told.wait()

    def status(self, caller: str) -> WorkerStatus:
        """The worker's figures at this moment, as this caller is told them."""
        return self._told_to(caller, self._measure())

    async def _read(self, watcher: _Watcher, requests: AsyncIterator[workers_pb2.WatchRequest]) -> None:
        async for request in requests:
            self._want(watcher, request)

    def _want(self, watcher: _Watcher, request: workers_pb2.WatchRequest) -> None:
        """Takes over what the caller wants. Raises InvalidRequest."""
        new = {digest_of(digest, "wanted") for digest in request.wanted} - watcher.wanted
        old = watcher.wanted & set(request.unwanted)
        count_of(len(watcher.wanted) + len(new), "wanted", 0, MOST_ADAPTERS)
        watcher.wanted = (watcher.wanted - old) | new
        if self._adapters is not None:
            self._adapters.want(new)
            self._adapters.unwant(old)
        waits, now = request.slot_wait_ms, time.monotonic()
        watcher.slot_since, watcher.slot_told = (now - waits / 1000 if waits else math.inf), now

    def _told_to(self, caller: str, measured: WorkerStatus) -> WorkerStatus:
        prompts, tokens = self._usage.other_work(caller)
        now = time.monotonic()
        others = (one for one in self._watchers if one.caller != caller and now - one.slot_told < WAIT_VALID)
        waited = now - min((one.slot_since for one in others), default=math.inf)
        return replace(
            measured,
            draining=self._draining and caller != self._spared,
            other_prompts=prompts,
            other_prompt_tokens=tokens,
            other_sequences=self._usage.other_sequences(caller),
            other_slot_wait_ms=min(MOST_WAIT_MS, int(1000 * max(0.0, waited))),
        )

    async def _messages(self, watcher: _Watcher, interval: float) -> AsyncGenerator[workers_pb2.StatusUpdate, None]:
        now = asyncio.get_running_loop().time
        patience = max(interval, SIGN_OF_LIFE)
        last: WorkerStatus | None = None
        sent_at = -patience
        while True:
            status = self._told_to(watcher.caller, self._recently_measured(now()))
            if status != last or watcher.changed or watcher.is_behind or now() >= sent_at + patience:
                is_whole = watcher.is_behind
                yield status_to_proto(StatusUpdate(status, self._news(watcher), is_whole), last)
                last, sent_at = status, now()
                watcher.knows_draining = status.draining
                self._told.set()
            await _wait(watcher.drains, SOON * interval)
            await _wait(watcher.news, min((1 - SOON) * interval, sent_at + patience - now()))
            watcher.news.clear()
            watcher.drains.clear()

    def _recently_measured(self, now: float) -> WorkerStatus:
        if now >= self._measured_at + MEASURE_SECONDS:
            self._measured, self._measured_at = self._measure(), now
        return self._measured

    def _news(self, watcher: _Watcher) -> dict[str, AdapterStatus]:
        """Takes what the watcher doesn't know yet; all adapters if the next message is a whole one."""
        if watcher.is_behind:
            watcher.is_behind = False
            watcher.changed = set(self._usage.prompted)
            if self._adapters is not None:
                watcher.changed.update(self._adapters.states())
        digests = set(islice(watcher.changed, MOST_ADAPTERS))
        watcher.changed -= digests
        return {digest: self._adapter(watcher.caller, digest) for digest in digests}

    def _adapter(self, caller: str, digest: str) -> AdapterStatus:
        state = self._adapters.state(digest) if self._adapters is not None else None
        return AdapterStatus(state, self._usage.other_prompts(caller, digest))

    def _changed(self, digest: str, by: str | None = None) -> None:
        """Notes the change for all streams but those of the caller `by`, who is told only of others' prompts."""
        for watcher in self._watchers:
            if watcher.caller != by and not watcher.is_behind:
                watcher.changed.add(digest)
                watcher.news.set()
                if len(watcher.changed) > MOST_ADAPTERS and len(watcher.changed) > 2 * self._known():
                    watcher.changed.clear()  # its reader doesn't read: memory doesn't grow with all that it misses
                    watcher.is_behind = True

    def _known(self) -> int:
        return self._adapters.totals().host_adapters if self._adapters is not None else 0


async def _wait(event: asyncio.Event, seconds: float) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
