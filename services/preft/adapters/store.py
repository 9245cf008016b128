"""A prefill worker's adapters over all tiers: source, disk, host memory, engine.

Owns what is in host memory and who uses it. An adapter comes in once for however many ask for it, beside the engine's
steps, and is held against its digest each time; one that is in use or pinned stays, the others go by least recent use.
What the engine has in its slots is the engine's business: it takes it from host memory, where it finds it as long as
somebody uses it.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Protocol, TypeVar

from preft.adapters.disk_tier import DiskTier
from preft.adapters.packed import AdapterFiles, DamagedCopy
from preft.adapters.sources import open_source
from preft.core.cluster import AdapterLoad, AdapterPlace, Tier
from preft.core.errors import InvalidAdapter, InvalidRequest, PreftError, TransferFailed, Unavailable
from preft.core.request import AdapterRef
from preft.transfer.staging import Region, StagingArena

T = TypeVar("T")

ATTEMPTS = 5  # at a fetch whose copy is evicted or damaged before it is read
FETCHES = 8  # sources at a time; they mostly wait for a network
READS = 2  # disk reads at a time
NICENESS = 10  # of their threads: engine steps come first
ROOM_SECONDS = 30.0  # how long a load waits for host memory
LISTED = 1024  # adapters named in a heartbeat


class AdapterEngine(Protocol):
    """What the store needs of an engine: see `preft.engine.port.Engine`."""

    async def place_adapter(self, adapter: AdapterRef, region: Region) -> None: ...

    async def aborted(self) -> None: ...


class AdapterStore:
    """The adapters of one worker. For one asyncio loop."""

    def __init__(
        self,
        worker_id: str,
        disk: DiskTier,
        arena: StagingArena,
        engine: AdapterEngine,
        slots: int,
        source_timeout: float,
        *,
        room_timeout: float = ROOM_SECONDS,
    ) -> None:
        """`engine` has `slots` slots and takes adapters from `arena`.

        `source_timeout`: seconds without a byte after which a source has failed; `room_timeout`: those that a load
        waits for host memory.
        """
        self._worker_id = worker_id
        self._disk = disk
        self._arena = arena
        self._engine = engine
        self._source_timeout = source_timeout
        self._room_timeout = room_timeout
        self._regions: OrderedDict[str, Region] = OrderedDict()  # by digest, least recently used first
        self._users: Counter[str] = Counter()
        self._pinned: frozenset[str] = frozenset()
        self._loading: dict[str, asyncio.Task[None]] = {}
        self._leaving: set[asyncio.Task[None]] = set()
        self._last_used: dict[str, float] = {}
        self._slots: OrderedDict[str, None] = OrderedDict()  # what the engine's slots hold, most recent last
        self._slot_limit = slots
        self._came_from: dict[str, Tier] = {}  # adapters that were brought in and not used yet
        self._forgotten: set[str] = set()  # in use, but no name points to them
        self._hits: Counter[Tier] = Counter()
        self._loads: Counter[Tier] = Counter()
        self._load_seconds = dict.fromkeys((Tier.DISK, Tier.SOURCE), 0.0)
        self._evictions = 0
        self._fetching = _background_threads(FETCHES, "adapter-fetch")
        self._reading = _background_threads(READS, "adapter-read")

    @property
    def digests(self) -> tuple[str, ...]:
        """Digests of the adapters in host memory, most recently used last; at most LISTED of them."""
        return tuple(self._regions)[-LISTED:]

    async def prefetch(self, adapter: AdapterRef) -> None:
        """Brings the adapter into host memory, unless it is there. Raises as `using`."""
        if adapter.digest not in self._regions:
            await self._loaded(adapter)

    @asynccontextmanager
    async def using(self, adapter: AdapterRef) -> AsyncIterator[None]:
        """Inside, the adapter is in host memory, and the engine finds it there.

        Raises InvalidAdapter if its content can't be had any more or the engine refuses it, SourceNotFound or
        Unavailable if its source fails, Unavailable if there is no room for it.
        """
        digest = adapter.digest
        self._users[digest] += 1
        try:
            while digest not in self._regions:  # again, should it have been evicted in between
                await self._loaded(adapter)
            self._hits[self._found_in(digest)] += 1
            self._touch(digest)
            yield
        except BaseException:
            task = asyncio.create_task(self._leave_aborted(digest))
            self._leaving.add(task)
            task.add_done_callback(self._leaving.discard)
            raise
        self._left(digest)

    async def _leave_aborted(self, digest: str) -> None:
        """A request that was given up may be in the engine's next step still, and needs its adapter there."""
        with suppress(PreftError):
            await self._engine.aborted()
        self._left(digest)

    def _left(self, digest: str) -> None:
        self._users[digest] -= 1
        self._last_used[digest] = time.time()
        if not self._users[digest]:
            del self._users[digest]
            if digest in self._forgotten:
                self.forget([digest])
        self._settle(digest)

    def _found_in(self, digest: str) -> Tier:
        """Where a request has found its adapter: for the first one after a load, that is where it came from."""
        now = Tier.SLOT if digest in self._slots else Tier.HOST
        return self._came_from.pop(digest, now)

    def pin(self, digests: Collection[str]) -> None:
        """From now on exactly these stay, in host memory once they are there and on disk."""
        before, self._pinned = self._pinned, frozenset(digests)
        self._disk.pinned = self._pinned
        self._forgotten -= self._pinned  # a name has come back to it
        for digest in before ^ self._pinned:
            self._settle(digest)

    def forget(self, digests: Collection[str]) -> None:
        """No name points to these any more: they leave host memory, once nobody uses them."""
        for digest in digests:
            if self._users[digest]:
                self._forgotten.add(digest)
                continue
            self._forgotten.discard(digest)
            self._last_used.pop(digest, None)
            if digest in self._regions:
                self._arena.release(self._regions[digest])
                self._gone(digest)

    def where(self, digest: str) -> AdapterPlace:
        """The nearest tier that has this content."""
        if digest in self._regions:
            tier = Tier.SLOT if digest in self._slots else Tier.HOST
        else:
            tier = Tier.DISK if (self._disk.root / digest).is_dir() else Tier.SOURCE
        return AdapterPlace(self._worker_id, tier, self._last_used.get(digest, 0.0), self._users[digest])

    def load(self) -> AdapterLoad:
        """What the tiers hold and have done, for the heartbeat."""
        return AdapterLoad(
            slots=self._slot_limit,
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
        """Ends the loads under way. Threads that read a source end by themselves."""
        while tasks := [*self._loading.values(), *self._leaving]:  # who waited for a load leaves once that has ended
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        self._fetching.shutdown(wait=False, cancel_futures=True)
        self._reading.shutdown(wait=False, cancel_futures=True)

    async def _loaded(self, adapter: AdapterRef) -> None:
        """Waits for the one load of this adapter. Who leaves early doesn't end it for the others."""
        task = self._loading.get(adapter.digest)
        if task is None:
            task = asyncio.create_task(self._load(adapter), name=f"load-{adapter.digest[:12]}")
            self._loading[adapter.digest] = task
            task.add_done_callback(lambda _: self._loading.pop(adapter.digest, None))
            task.add_done_callback(lambda task: task.cancelled() or task.exception())  # all waiters may have left
        await asyncio.shield(task)

    async def _load(self, adapter: AdapterRef) -> None:
        started, tier = time.perf_counter(), Tier.DISK
        files = await self._in(self._reading, self._open, adapter.digest)
        while True:
            if files is None:
                tier = Tier.SOURCE
                files = await self._in(self._fetching, self._fetch, adapter)
            try:
                region = await self._read(files, adapter.digest)
                break
            except DamagedCopy as error:
                await self._in(self._reading, self._disk.discard, adapter.digest)
                if tier is Tier.SOURCE:
                    raise Unavailable(
                        f"the copy of adapter {adapter.name!r} came out different, {error}: the disk is failing"
                    ) from error
                files = None
        try:
            await self._engine.place_adapter(adapter, region)
        except BaseException:
            self._arena.release(region)
            raise
        self._came_from[adapter.digest] = tier
        self._loads[tier] += 1
        self._load_seconds[tier] += time.perf_counter() - started
        self._regions[adapter.digest] = region
        self._settle(adapter.digest)

    def _open(self, digest: str) -> AdapterFiles | None:
        folder = self._disk.find(digest)
        if folder is None:
            return None
        try:
            return AdapterFiles(folder)
        except FileNotFoundError:
            return None  # evicted in this moment
        except DamagedCopy:
            self._disk.discard(digest)
            return None

    def _fetch(self, adapter: AdapterRef) -> AdapterFiles:
        source = open_source(adapter.source, timeout=self._source_timeout)
        for _ in range(ATTEMPTS):
            self._disk.fetch(source, _nothing_more, digest=adapter.digest)
            files = self._open(adapter.digest)
            if files is not None:
                return files
        raise Unavailable(f"the copy of adapter {adapter.name!r} is evicted as soon as it is there: try again later")

    async def _read(self, files: AdapterFiles, digest: str) -> Region:
        """Raises DamagedCopy, or Unavailable if there is no room."""
        try:
            try:
                region = await self._arena.reserve(files.packed_size, timeout=self._room_timeout)
            except InvalidRequest as error:
                raise InvalidAdapter(
                    f"the adapter has {files.size} bytes, more than store.host_bytes can hold"
                ) from error
            except TransferFailed as error:
                raise Unavailable("the host memory for adapters is taken by others that are in use") from error
            reading = self._in(self._reading, files.pack, self._arena.view(region), digest)
            try:
                await reading
            except asyncio.CancelledError:
                raise  # the store closes; the thread still writes to the region
            except BaseException:
                self._arena.release(region)
                raise
            return region
        finally:
            files.close()

    def _touch(self, digest: str) -> None:
        self._regions.move_to_end(digest)
        self._slots[digest] = None
        self._slots.move_to_end(digest)
        if len(self._slots) > self._slot_limit:
            self._slots.popitem(last=False)
        self._settle(digest)

    def _settle(self, digest: str) -> None:
        """Evictable or not, now that something has changed."""
        region = self._regions.get(digest)
        if region is None:
            return
        if self._users[digest] or digest in self._pinned:
            self._arena.keep(region)
        else:
            self._arena.mark_evictable(region, lambda: self._evicted(digest))

    def _evicted(self, digest: str) -> None:
        self._evictions += 1
        self._gone(digest)

    def _gone(self, digest: str) -> None:
        del self._regions[digest]
        self._slots.pop(digest, None)
        self._came_from.pop(digest, None)

    async def _in(self, threads: ThreadPoolExecutor, work: Callable[..., T], *arguments: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(threads, work, *arguments)


def _nothing_more(copy: Path) -> None:
    """The digest says that the catalog has checked this content."""


def _background_threads(count: int, name: str) -> ThreadPoolExecutor:
    """Threads whose work waits for that of others (on Linux each thread has a niceness of its own)."""
    return ThreadPoolExecutor(
        count, name, initializer=lambda: os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
    )
