"""A prefill worker's adapters in all tiers: source, disk, host memory, engine.

The store owns the adapters in host memory, and the count of their users. Concurrent requests for an adapter share one
load, which checks the digest and runs beside the engine's steps. An adapter in use stays; unused ones are evicted,
least recently used first. A pinned adapter is evicted only if another adapter fits nowhere beside the pinned ones, and
is loaded again at once. The engine copies an adapter from host memory, and the region there is kept while a request
uses the adapter.

The engine's slots are vLLM's, which tells nobody what they hold: to ask would be a call into the engine's process, at
a wait of up to a step. So the store takes the adapters of the latest requests for those in slots. vLLM replaces the
least recently used adapter too, but counts uses by steps. A wrong guess costs one copy from host memory, no more.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager, suppress
from typing import Protocol

from preft.adapters.sources.limits import SourceLimits
from preft.adapters.sources.peers import Peers
from preft.adapters.store.adapter_loader import AdapterLoader, unavailable
from preft.adapters.store.disk_tier import DiskTier
from preft.core.background import Background
from preft.core.cluster import AdapterState, Tier, TierTotals
from preft.core.errors import InvalidRequest, PreftError
from preft.core.request import AdapterRef
from preft.memory.arena import Region, StagingArena

logger = logging.getLogger(__name__)

ROOM_SECONDS = 30.0  # a load's longest wait for host memory


class AdapterEngine(Protocol):
    """The store's view of an engine: see `preft.engine.port.Engine`."""

    async def place_adapter(self, adapter: AdapterRef, region: Region) -> None: ...

    async def between_steps(self) -> None: ...

    def forget_adapter(self, digest: str) -> None: ...


class AdapterStore:
    """The adapters of one worker. Use it inside one asyncio loop."""

    def __init__(
        self,
        disk: DiskTier,
        arena: StagingArena,
        engine: AdapterEngine,
        slots: int,
        limits: SourceLimits,
        *,
        peers: Peers | None = None,
        room_timeout: float = ROOM_SECONDS,
    ) -> None:
        """`engine` has `slots` slots and copies adapters from `arena`. `peers` are asked for what sources don't give.

        `room_timeout`: seconds that a load waits for host memory, and seconds between attempts to load an evicted
        pinned adapter again.
        """
        self._disk = disk
        self._arena = arena
        self._engine = engine
        self._loader = AdapterLoader(disk, arena, limits, room_timeout, peers)
        self._room_timeout = room_timeout
        self._regions: OrderedDict[str, Region] = OrderedDict()  # by digest, least recently used first
        self._adapters: dict[str, AdapterRef] = {}  # by digest, those in host memory
        self._users: Counter[str] = Counter()
        self._pinned: frozenset[str] = frozenset()
        self._wanted: Counter[str] = Counter()  # callers that want each digest
        self._loading: dict[str, asyncio.Task[None]] = {}
        self._background = Background()  # ends of aborted uses, and returns of pinned adapters
        self._slots: OrderedDict[str, None] = OrderedDict()  # adapters in the engine's slots, most recent last
        self._slot_limit = slots
        self._came_from: dict[str, Tier] = {}  # the origin of adapters that were loaded and not used yet
        self._forgotten: set[str] = set()  # adapters in use to which no name points
        self._hits: Counter[Tier] = Counter()
        self._loads: Counter[Tier] = Counter()
        self._load_seconds = dict.fromkeys((Tier.DISK, Tier.SOURCE), 0.0)
        self._evictions = 0
        self._on_change: Callable[[str], None] = lambda digest: None

    def observe(self, on_change: Callable[[str], None]) -> None:
        """From now on calls `on_change` with a digest after each change of its `state`. There is one observer."""
        self._on_change = on_change

    def state(self, digest: str) -> AdapterState | None:
        """None: the worker neither holds nor loads it."""
        if digest in self._regions:
            return AdapterState.SLOT if digest in self._slots else AdapterState.HOST
        return AdapterState.LOADING if digest in self._loading else None

    def states(self) -> dict[str, AdapterState]:
        """The states of all adapters in host memory, least recently used first, then of those that are loaded now."""
        found = {digest: self.state(digest) for digest in (*self._regions, *self._loading)}
        return {digest: state for digest, state in found.items() if state is not None}

    async def prefetch(self, adapter: AdapterRef) -> None:
        """Loads the adapter into host memory, unless it is there. Raises as `using`."""
        if adapter.digest not in self._regions:
            await self._wait_loaded(adapter)

    @asynccontextmanager
    async def using(self, adapter: AdapterRef) -> AsyncIterator[None]:
        """Inside this context the adapter is in host memory, where the engine finds it.

        Raises AdapterUnavailable if the adapter's content can't be obtained, or if the engine refuses the adapter: the
        request is not at fault. Raises Unavailable if host memory has no room.
        """
        digest = adapter.digest
        self._users[digest] += 1
        try:
            while digest not in self._regions:  # repeats after an eviction
                await self._wait_loaded(adapter)
            self._hits[self._found_in(digest)] += 1
            self._touch(digest)
            yield
        except BaseException:
            self._background.start(
                self._end_aborted_use(digest), f"the end of a request's use of adapter {adapter.name!r}"
            )
            raise
        self._end_use(digest)

    async def _end_aborted_use(self, digest: str) -> None:
        """Ends the use after the engine has dropped the aborted request, which may still be in the next step."""
        with suppress(PreftError):
            await self._engine.between_steps()
        self._end_use(digest)

    def _end_use(self, digest: str) -> None:
        self._users[digest] -= 1
        if not self._users[digest]:
            del self._users[digest]
            if digest in self._forgotten:
                self.forget([digest])
        self._settle(digest)

    def _found_in(self, digest: str) -> Tier:
        """The tier where a request found its adapter. The first request after a load counts for the load's origin."""
        now = Tier.SLOT if digest in self._slots else Tier.HOST
        return self._came_from.pop(digest, now)

    def pin(self, digests: Collection[str]) -> None:
        """Pins exactly these digests: they stay on disk, and in host memory once they are there.

        A pinned adapter that is evicted, because another fits nowhere beside the pinned ones, is loaded again.
        """
        before, self._pinned = self._pinned, frozenset(digests)
        self._disk.pinned = self._pinned
        self._forgotten -= self._pinned  # a pinned digest has a name
        for digest in before ^ self._pinned:
            self._settle(digest)

    def want(self, digests: Collection[str]) -> None:
        """Requests for these adapters wait elsewhere: they are evicted after others, until `unwant`."""
        self._wanted.update(digests)

    def unwant(self, digests: Collection[str]) -> None:
        """Ends as many calls of `want`."""
        for digest in digests:
            self._wanted[digest] -= 1
            if not self._wanted[digest]:
                del self._wanted[digest]

    def forget(self, digests: Collection[str]) -> None:
        """Drops adapters that have lost their last name from host memory, once no request uses them."""
        for digest in digests:
            if self._users[digest]:
                self._forgotten.add(digest)
                continue
            self._forgotten.discard(digest)
            if digest in self._regions:
                self._arena.release(self._regions[digest])
                self._drop(digest)

    def totals(self) -> TierTotals:
        """The tiers' contents and counters. Cheap, however many adapters there are."""
        return TierTotals(
            slots_used=len(self._slots),
            host_adapters=len(self._regions),
            host_bytes=self._arena.used,
            host_bytes_total=self._arena.capacity,
            disk_bytes=self._disk.bytes_seen,
            host_evictions=self._evictions,
            disk_evictions=self._disk.evictions,
            hits=dict(self._hits),
            loads=dict(self._loads),
            load_seconds=dict(self._load_seconds),
        )

    async def close(self) -> None:
        """Cancels loads under way. Threads that read a source end soon, by themselves."""
        self._loader.stop()
        while loading := list(self._loading.values()):
            for task in loading:
                task.cancel()
            await asyncio.gather(*loading, return_exceptions=True)
            await self._background.close()  # a return of a pinned adapter may have begun another load
        await self._background.close()
        self._loader.close()

    async def _wait_loaded(self, adapter: AdapterRef) -> None:
        """Waits for the adapter's one load. A cancelled waiter doesn't cancel the load."""
        digest = adapter.digest
        task = self._loading.get(digest)
        if task is None or task.done():  # a done task stays until its callback; its adapter may be evicted already
            task = asyncio.create_task(self._load(adapter), name=f"load-{digest[:12]}")
            self._loading[digest] = task
            task.add_done_callback(lambda task: self._on_load_end(digest, task))
            self._on_change(digest)
        await asyncio.shield(task)

    def _on_load_end(self, digest: str, task: asyncio.Task[None]) -> None:
        if self._loading[digest] is task:
            del self._loading[digest]
            self._on_change(digest)
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, PreftError):  # all waiters may have left
            logger.error("the load of adapter %s broke", digest, exc_info=error)

    async def _load(self, adapter: AdapterRef) -> None:
        started = time.perf_counter()
        digest = adapter.digest
        for wanted in self._wanted.keys() & self._regions.keys():
            self._arena.touch(self._regions[wanted])
        region, tier = await self._loader.load(adapter, lambda: digest in self._pinned)
        try:
            await self._engine.place_adapter(adapter, region)
        except InvalidRequest as error:
            self._arena.release(region)
            raise unavailable(adapter, "the engine refuses it", error) from error
        except BaseException:
            self._arena.release(region)
            raise
        self._came_from[digest] = tier
        self._loads[tier] += 1
        self._load_seconds[tier] += time.perf_counter() - started
        self._regions[digest] = region
        self._adapters[digest] = adapter
        self._on_change(digest)
        self._settle(digest)

    def _touch(self, digest: str) -> None:
        self._regions.move_to_end(digest)
        if digest in self._slots:
            self._slots.move_to_end(digest)
        else:
            self._slots[digest] = None
            self._on_change(digest)
        if len(self._slots) > self._slot_limit:
            left, _ = self._slots.popitem(last=False)
            self._on_change(left)
        self._settle(digest)

    def _settle(self, digest: str) -> None:
        """Applies pins and users to the adapter's region: kept or evictable."""
        region = self._regions.get(digest)
        if region is None:
            return
        self._arena.pin(region, digest in self._pinned)
        if self._users[digest]:
            self._arena.keep(region)
        else:
            self._arena.mark_evictable(region, lambda: self._on_eviction(digest))

    def _on_eviction(self, digest: str) -> None:
        self._evictions += 1
        adapter = self._adapters[digest]
        self._drop(digest)
        if digest in self._pinned:
            self._background.start(self._bring_back(adapter), f"the return of the pinned adapter {adapter.name!r}")

    async def _bring_back(self, adapter: AdapterRef) -> None:
        """Loads an evicted pinned adapter again, and retries until it succeeds or the pin ends."""
        while adapter.digest in self._pinned:
            try:
                return await self.prefetch(adapter)
            except PreftError as error:
                logger.warning("the pinned adapter %r isn't in memory: %s", adapter.name, error)
            await asyncio.sleep(self._room_timeout)

    def _drop(self, digest: str) -> None:
        del self._regions[digest], self._adapters[digest]
        self._engine.forget_adapter(digest)
        self._slots.pop(digest, None)
        self._came_from.pop(digest, None)
        self._on_change(digest)
