"""Brings an adapter's content into host memory: from the disk tier, else from its source, else from a peer.

The loader owns the threads that read and fetch. It checks the content against the digest each time. `AdapterStore`
decides what to load, and owns the loaded regions.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, closing
from typing import TypeVar

from preft.adapters.sources.fetch_threads import FetchThreads
from preft.adapters.sources.limits import SourceLimits
from preft.adapters.sources.peers import Peers
from preft.adapters.sources.source import AdapterSource, open_source
from preft.adapters.store.disk_tier import DiskTier
from preft.adapters.store.packed import AdapterFiles, DamagedCopy
from preft.core.cluster import Tier
from preft.core.errors import AdapterUnavailable, InvalidAdapter, PreftError, SourceNotFound, Unavailable
from preft.core.request import AdapterRef
from preft.memory.arena import Region, StagingArena
from preft.memory.errors import NoRoom, TooLarge

logger = logging.getLogger(__name__)

T = TypeVar("T")

ATTEMPTS = 5  # fetches of an adapter whose copy is evicted or damaged before it is read
READS = 2  # concurrent disk reads
NICENESS = 10  # of the fetch and read threads: engine steps come first


class AdapterLoader:
    """The loads of one worker. Use it inside one asyncio loop."""

    def __init__(
        self, disk: DiskTier, arena: StagingArena, limits: SourceLimits, room_timeout: float, peers: Peers | None
    ) -> None:
        """`room_timeout`: seconds that a load waits for memory in `arena`. `peers` None: no other process is asked."""
        self._disk = disk
        self._arena = arena
        self._limits = limits
        self._room_timeout = room_timeout
        self._peers = peers
        self._stop = threading.Event()  # ends fetches
        self._fetching = FetchThreads("adapter-fetch", _give_way)
        self._reading = ThreadPoolExecutor(READS, "adapter-read", _give_way)

    async def load(self, adapter: AdapterRef, is_pinned: Callable[[], bool]) -> tuple[Region, Tier]:
        """The region with the adapter's content, and the tier that the content came from. The caller owns the region.

        A region for which `is_pinned` is true may take the room of evictable ones that are pinned. While the load waits
        for room, it keeps no file open. Raises AdapterUnavailable if the content can't be obtained, and Unavailable if
        disk or memory have no room.
        """
        for fetches in range(1 + ATTEMPTS):
            if fetches:
                sizes = await self._fetch(adapter)
            else:
                sizes = await self._in_thread(self._sizes, adapter.digest)
            try:
                region = None if sizes is None else await self._read(adapter, *sizes, is_pinned)
            except DamagedCopy as error:
                await self._in_thread(self._disk.discard, adapter.digest)
                if fetches:
                    raise Unavailable(
                        f"the copy of adapter {adapter.name!r} came out different, {error}: the disk is failing"
                    ) from error
                continue
            if region is not None:
                return region, Tier.SOURCE if fetches else Tier.DISK
        raise Unavailable(f"the copy of adapter {adapter.name!r} is evicted as soon as it is there: try again later")

    def stop(self) -> None:
        """Ends fetches soon, by themselves. Call `close` after the last load."""
        self._stop.set()

    def close(self) -> None:
        """Takes no more work."""
        self._fetching.close()
        self._reading.shutdown(wait=False, cancel_futures=True)

    def _open(self, digest: str) -> AdapterFiles | None:
        folder = self._disk.find(digest)
        if folder is None:
            return None
        try:
            return AdapterFiles(folder)
        except FileNotFoundError:
            return None  # evicted just now
        except DamagedCopy:
            self._disk.discard(digest)
            return None

    def _sizes(self, digest: str) -> tuple[int, int] | None:
        """Bytes of the copy on disk, and of its packed form in memory; None if there is no copy."""
        files = self._open(digest)
        if files is None:
            return None
        files.close()
        return files.size, files.packed_size

    async def _fetch(self, adapter: AdapterRef) -> tuple[int, int] | None:
        """Copies the adapter to the disk, from its source or else from the first peer that has it.

        Returns the `_sizes` of the copy; None if the copy was evicted at once.
        """
        failure: PreftError
        try:
            source = open_source(adapter.source, self._limits, stop=self._stop)
            return await self._fetch_from(source, adapter.digest)
        except SourceNotFound as error:
            why, failure = "its source is gone", error
        except InvalidAdapter as error:
            why, failure = "its source no longer holds the version that was added: add the adapter again", error
        except PreftError as error:
            why, failure = "it can't be fetched from its source", error
        if self._peers is not None:
            async with aclosing(self._peers.find(adapter.digest, self._stop)) as sources:
                async for source in sources:
                    try:
                        return await self._fetch_from(source, adapter.digest)
                    except PreftError as error:
                        logger.warning("adapter %r can't be fetched from a peer: %s", adapter.name, error)
        raise unavailable(adapter, why, failure) from failure

    async def _fetch_from(self, source: AdapterSource, digest: str) -> tuple[int, int] | None:
        def fetch() -> tuple[int, int] | None:
            self._disk.fetch(source, _nothing_more, digest=digest)
            return self._sizes(digest)

        return await self._fetching.run(source.place, fetch)

    async def _read(
        self, adapter: AdapterRef, size: int, packed_size: int, is_pinned: Callable[[], bool]
    ) -> Region | None:
        """Packs the copy into a new region; None if the copy is gone. Raises DamagedCopy, or Unavailable if full."""
        try:
            region = await self._arena.reserve(packed_size, timeout=self._room_timeout, pinned=is_pinned())
        except TooLarge as error:
            why = f"it has {size} bytes, more than store.host_bytes can hold"
            raise unavailable(adapter, why, error) from error
        except NoRoom as error:
            raise Unavailable("the host memory for adapters is taken by others that are in use") from error
        try:
            if await self._in_thread(self._pack, adapter.digest, self._arena.view(region)):
                return region
        except asyncio.CancelledError:
            raise  # the store closes; its thread may still write to the region, so the region isn't released
        except BaseException:
            self._arena.release(region)
            raise
        self._arena.release(region)
        return None

    def _pack(self, digest: str, memory: memoryview) -> bool:
        """Fills `memory` from the copy on disk; False if the copy is gone. Raises DamagedCopy."""
        files = self._open(digest)
        if files is None:
            return False
        with closing(files):
            files.pack(memory, digest)
        return True

    async def _in_thread(self, work: Callable[..., T], *arguments: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._reading, work, *arguments)


def unavailable(adapter: AdapterRef, why: str, error: PreftError) -> AdapterUnavailable:
    """The error for requests that use an added adapter. Details about files and hosts go to the log alone."""
    logger.warning("adapter %r, from %s, can't be used: %s", adapter.name, adapter.source, error)
    return AdapterUnavailable(f"adapter {adapter.name!r} can't be used now: {why}")


def _nothing_more(copy: object) -> None:
    """Checks nothing: the digest shows that the catalog has checked this content."""


def _give_way() -> None:
    """Lowers this thread's priority; on Linux each thread has a niceness of its own."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
