"""The arena: shared host memory between a worker process and its engine process.

The module owns the shared memory, its regions and evictions, and when bytes may be reused. The meaning and origin of
the bytes, and handles, belong to other modules. Both processes import the module, so it
needs the standard library and the errors only.

A region is a 64-byte header (magic, nonce, size) and a payload. The worker (`StagingArena`) reserves and releases
regions. The engine (`StagingView`) accesses a payload only inside `hold`, which keeps a shared file lock on the
header's first byte. A release wipes the header first, and frees the bytes when no process holds that lock. So an engine
that is late for an aborted request is refused, and an engine that is copying never sees or overwrites another region's
bytes. The kernel drops the locks of a process that dies.
"""

from __future__ import annotations

import asyncio
import fcntl
import mmap
import os
import struct
import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from preft.memory.errors import NoRoom, StaleRegion, TooLarge
from preft.memory.spans import FreeSpans

HEADER_BYTES = 64
RECHECK_SECONDS = 0.005  # between checks whether the engine still holds a released region

_HEADER = struct.Struct("<8s16sQ")  # magic, nonce, size; the rest of the 64 bytes is zero
_MAGIC = b"PREFTKV1"
_FLOCK = struct.Struct("hhqqi4x")  # struct flock on 64-bit Linux: type, whence, start, length, pid


@dataclass(frozen=True, slots=True)
class Region:
    """One reservation: a payload of `size` bytes at `offset` bytes of the arena. `nonce` is 16 bytes, never reused."""

    offset: int
    size: int
    nonce: bytes

    @property
    def start(self) -> int:
        """The header's offset."""
        return self.offset - HEADER_BYTES

    @property
    def span(self) -> int:
        """Bytes taken in the arena: header and payload, rounded up so that payloads are 64-byte aligned."""
        return span_of(self.size)


def span_of(size: int) -> int:
    """Bytes that a payload of `size` bytes takes in an arena."""
    return HEADER_BYTES + (size + HEADER_BYTES - 1) // HEADER_BYTES * HEADER_BYTES


def _ends(region: Region) -> tuple[int, int]:
    return region.start, region.start + region.span


class StagingArena:
    """The worker's side, for one asyncio loop. Only `reserve` waits.

    The memory is anonymous (memfd): it lies in no file system and leaves nothing behind after a crash, the limit of
    `/dev/shm` doesn't apply, and a page takes memory only once it is used. The engine can open `path` while this
    process lives.
    """

    def __init__(self, fd: int, capacity: int) -> None:
        self._fd = fd
        self._map = mmap.mmap(fd, capacity)
        self._memory = memoryview(self._map)
        self._free = FreeSpans(capacity)
        self._live: dict[int, Region] = {}  # by payload offset
        self._evictable: OrderedDict[Region, Callable[[], None]] = OrderedDict()  # least recently used first
        self._pinned: set[Region] = set()
        self._lingering: list[Region] = []  # released, but still held by the engine
        self._waiters: deque[tuple[int, bool, asyncio.Future[Region]]] = deque()  # size, pinned
        self._recheck: asyncio.TimerHandle | None = None
        self._closed = False
        self.capacity = capacity
        self.path = f"/proc/{os.getpid()}/fd/{fd}"

    @classmethod
    def create(cls, capacity: int) -> StagingArena:
        """An empty arena of `capacity` bytes."""
        fd = os.memfd_create("preft-staging", os.MFD_CLOEXEC)
        os.ftruncate(fd, capacity)
        return cls(fd, capacity)

    @property
    def used(self) -> int:
        """Bytes that aren't free. Headers, rounding, and released regions that the engine still holds count."""
        return self.capacity - self._free.total

    @property
    def evictable(self) -> int:
        """Used bytes that can be evicted."""
        return sum(region.span for region in self._evictable)

    @property
    def fit(self) -> int:
        """Bytes of the largest unpinned region that could be reserved without waiting; header and rounding count.

        Evictable regions make room, as in `reserve`. 0 while reservations wait: a new one would wait behind them.
        """
        if self._waiters or self._closed:
            return 0
        loose = [region for region in self._evictable if region not in self._pinned]
        fit = self._free.largest(map(_ends, loose))
        if len(loose) < len(self._evictable):
            with_pinned = self._free.largest(map(_ends, self._evictable))
            if with_pinned > fit and not self._fits_beside_pinned(with_pinned):
                return with_pinned
        return fit

    @property
    def regions(self) -> int:
        return len(self._live)

    async def reserve(self, size: int, *, timeout: float, pinned: bool = False) -> Region:
        """A region for `size` bytes with undefined content. The caller writes all bytes and always releases the region.

        Requests are served in order: small ones don't overtake a large one. Before a request waits, evictable regions
        are evicted, least recently used first. A `pinned` region can evict only smaller pinned ones, so that two never
        evict each other in turn. Raises TooLarge if the size can never fit, and NoRoom after `timeout` seconds.
        """
        if size < 1 or span_of(size) > self.capacity:
            raise TooLarge(f"{size} bytes don't fit into an arena of {self.capacity} bytes")
        if self._closed:
            raise NoRoom("the arena is closed")
        if not self._waiters and (region := self._allocate(size, pinned)) is not None:
            return region
        future: asyncio.Future[Region] = asyncio.get_running_loop().create_future()
        waiter = (size, pinned, future)
        self._waiters.append(waiter)
        try:
            async with asyncio.timeout(timeout):
                return await future
        except TimeoutError:
            self._leave(waiter)
            raise NoRoom(f"no room for {size} bytes in the arena within {timeout:g} s") from None
        except asyncio.CancelledError:
            self._leave(waiter)
            raise

    def release(self, region: Region) -> None:
        """Releases the region: no process can begin to use it any more. A second call does nothing."""
        self._drop(region)
        self._admit()

    def mark_evictable(self, region: Region, on_evict: Callable[[], None]) -> None:
        """Allows eviction of the region, which then calls `on_evict`. Marking again counts as a use."""
        if self._live.get(region.offset) == region:
            self._evictable[region] = on_evict
            self._evictable.move_to_end(region)
            self._admit()

    def touch(self, region: Region) -> None:
        """Counts as a use: an evictable region is then evicted after all others."""
        if region in self._evictable:
            self._evictable.move_to_end(region)

    def keep(self, region: Region) -> None:
        """Forbids eviction of the region until it is marked evictable again."""
        self._evictable.pop(region, None)

    def pin(self, region: Region, pinned: bool) -> None:
        """Pins or unpins. A pinned evictable region is evicted only for one that fits nowhere beside pinned regions."""
        if pinned and self._live.get(region.offset) == region:
            self._pinned.add(region)
        else:
            self._pinned.discard(region)

    def view(self, region: Region) -> memoryview:
        """The payload, `region.size` writable bytes; not valid after the release. Raises StaleRegion."""
        if self._live.get(region.offset) != region:
            raise StaleRegion("the region was released or evicted")
        return self._memory[region.offset : region.offset + region.size]

    def close(self) -> None:
        """Refuses waiting and later reservations. The memory is freed when the last process that maps it unmaps it."""
        if self._closed:
            return
        self._closed = True
        if self._recheck is not None:
            self._recheck.cancel()
        for *_, future in self._waiters:
            if not future.done():
                future.set_exception(NoRoom("the arena is closed"))
        self._waiters.clear()
        for region in list(self._live.values()):
            self._drop(region)
        os.close(self._fd)
        self._memory.release()
        with suppress(BufferError):  # a payload is still referenced; the mapping ends with the last view
            self._map.close()

    def _allocate(self, size: int, pinned: bool) -> Region | None:
        span = span_of(size)
        if self._free.find(span) is None:
            self._evict_for(span, pinned)
        start = self._free.take(span)
        if start is None:
            return None
        region = Region(start + HEADER_BYTES, size, os.urandom(16))
        _HEADER.pack_into(self._memory, start, _MAGIC, region.nonce, size)
        self._live[region.offset] = region
        self.pin(region, pinned)
        return region

    def _evict_for(self, span: int, pinned: bool) -> None:
        """Evicts least recently used regions inside one hole of `span` bytes; none if no such hole can be made."""
        trial = self._free.copy()
        candidates = []
        for region in self._candidates(span, pinned):
            candidates.append(region)
            trial.give(region.start, region.span)
            if (start := trial.find(span)) is not None:
                break
        else:
            return
        for region in candidates:
            if start < region.start + region.span and region.start < start + span:
                on_evict = self._evictable[region]
                self._drop(region)
                on_evict()

    def _candidates(self, span: int, pinned: bool) -> Iterator[Region]:
        """Regions that may be evicted for `span` bytes, in order; pinned ones, if at all, last and smallest first."""
        yield from (region for region in self._evictable if region not in self._pinned)
        if not self._fits_beside_pinned(span):
            loose = (region for region in self._evictable if region in self._pinned)
            yield from sorted((r for r in loose if r.span < span or not pinned), key=lambda r: r.span)

    def _fits_beside_pinned(self, span: int) -> bool:
        """Whether `span` bytes fit beside the pinned regions. Then waiting for other regions makes sense."""
        end = 0
        for region in sorted(self._pinned, key=lambda region: region.start):
            if region.start - end >= span:
                return True
            end = region.start + region.span
        return self.capacity - end >= span

    def _drop(self, region: Region) -> None:
        if self._live.get(region.offset) != region:
            return
        del self._live[region.offset]
        self._evictable.pop(region, None)
        self._pinned.discard(region)
        self._memory[region.start : region.offset] = bytes(HEADER_BYTES)
        if self._held(region):
            self._lingering.append(region)
            self._watch()
        else:
            self._free.give(region.start, region.span)

    def _admit(self) -> None:
        """Serves waiting reservations, in order, while there is room."""
        while self._waiters:
            size, pinned, future = self._waiters[0]
            if not future.done():
                region = self._allocate(size, pinned)
                if region is None:
                    return
                future.set_result(region)
            self._waiters.popleft()

    def _leave(self, waiter: tuple[int, bool, asyncio.Future[Region]]) -> None:
        *_, future = waiter
        if waiter in self._waiters:
            self._waiters.remove(waiter)
        elif future.done() and not future.cancelled() and future.exception() is None:
            self._drop(future.result())  # granted at the moment the waiter gave up
        self._admit()

    def _held(self, region: Region) -> bool:
        query = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, region.start, 1, 0)
        answer = fcntl.fcntl(self._fd, fcntl.F_OFD_GETLK, query)
        return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)

    def _watch(self) -> None:
        if self._lingering and self._recheck is None and not self._closed:
            self._recheck = asyncio.get_running_loop().call_later(RECHECK_SECONDS, self._reap)

    def _reap(self) -> None:
        self._recheck = None
        still = [region for region in self._lingering if self._held(region)]
        for region in self._lingering:
            if region not in still:
                self._free.give(region.start, region.span)
        self._lingering = still
        self._admit()
        self._watch()


class StagingView:
    """The engine's side: opens the worker's arena by its `path`. Thread-safe. Raises OSError if the arena is gone."""

    def __init__(self, path: str | Path) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self._capacity = os.fstat(self._fd).st_size
        self._memory = memoryview(mmap.mmap(self._fd, self._capacity))
        self._holders: Counter[int] = Counter()  # threads share one lock per region: file locks aren't counted
        self._mutex = threading.Lock()

    @contextmanager
    def hold(self, region: Region) -> Iterator[memoryview]:
        """The region's payload: readable and writable bytes that aren't reused inside this context.

        All reads and writes, asynchronous device copies included, must be finished before the context ends. Raises
        StaleRegion at the start, without a payload, if the region isn't exactly the reserved one.
        """
        start, end = region.start, region.offset + region.size
        if start < 0 or region.size < 1 or end > self._capacity:
            raise StaleRegion(f"no region of {region.size} bytes can lie at {region.offset}")
        self._lock(start)
        try:
            if _HEADER.unpack_from(self._memory, start) != (_MAGIC, region.nonce, region.size):
                raise StaleRegion("the region was released, evicted or reused")
            yield self._memory[region.offset : end]
        finally:
            self._unlock(start)

    @property
    def memory(self) -> memoryview:
        """The whole arena. Access payloads only inside `hold`."""
        return self._memory

    def close(self) -> None:
        """Closes the arena. Payloads that are still referenced stay mapped."""
        os.close(self._fd)
        self._memory.release()

    def _lock(self, start: int) -> None:
        with self._mutex:
            self._holders[start] += 1
            if self._holders[start] == 1:
                fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, start, 1, 0))

    def _unlock(self, start: int) -> None:
        with self._mutex:
            self._holders[start] -= 1
            if not self._holders[start]:
                del self._holders[start]
                fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, start, 1, 0))
