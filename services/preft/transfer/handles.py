"""The decode worker's KV handles: arriving, ready or ended, with their claims.

The table owns a ready handle's staging region until the last claim is closed. `receive` receives the bytes; transports
are not known here.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from preft.core.errors import TransferFailed
from preft.core.request import KvHeader
from preft.memory.arena import Region, StagingArena

REMEMBERED = 4096  # ended handles whose reason is kept, for clear errors and to refuse late pushes


@dataclass(slots=True, eq=False)
class _Handle:
    header: KvHeader
    abort: Callable[[str], None]
    unclaimed: int
    region: Region | None = None  # None while arriving: the receiver owns the bytes
    evicted: bool = False
    claims: set[Claim] = field(default_factory=set)
    loading: int = 0  # claims whose KV the engine hasn't copied yet
    settled: asyncio.Event = field(default_factory=asyncio.Event)  # ready or ended
    lease: asyncio.TimerHandle | None = None


class Claim:
    """One choice's right to use a handle's KV. Always close it."""

    def __init__(self, handles: HandleTable, handle: _Handle, region: Region) -> None:
        self._handles = handles
        self._handle = handle
        self.region = region
        self._loading = True

    @property
    def evicted(self) -> bool:
        """Whether the region was evicted, so that its KV can't be loaded again."""
        return self._handle.evicted

    def loaded(self) -> None:
        """The engine has copied the KV. The region becomes evictable when this holds for all uses."""
        if self._loading:  # `loaded` is called for every token
            self._loading = False
            self._handle.loading -= 1
            self._handles._settle(self._handle)

    def close(self) -> None:
        """Ends the use. A second call does nothing."""
        self._handle.loading -= self._loading
        self._loading = False
        self._handle.claims.discard(self)
        self._handles._settle(self._handle)


class HandleTable:
    """All handles of one decode worker, for one asyncio loop.

    A handle is arriving (opened, bytes under way), ready, or ended; for an ended handle only the reason is kept.
    `lease`: seconds that a ready handle waits for its next claim, after which its unclaimed uses end.
    """

    def __init__(self, arena: StagingArena, *, fingerprint: str, lease: float) -> None:
        self._arena = arena
        self._fingerprint = fingerprint
        self._lease = lease
        self._open: dict[str, _Handle] = {}
        self._ended: OrderedDict[str, str] = OrderedDict()

    @property
    def open_handles(self) -> int:
        """Handles that are arriving or ready."""
        return len(self._open)

    def open(self, header: KvHeader, abort: Callable[[str], None]) -> None:
        """Registers an arriving handle. Raises TransferFailed. If the handle ends early, `abort` gets the reason."""
        if (
            not header.handle
            or min(header.num_tokens, header.num_bytes, header.uses) < 1
            or len(header.prompt_hash) != 32
        ):
            raise TransferFailed("the KV header is malformed")
        if header.fingerprint != self._fingerprint:
            raise TransferFailed(
                f"the KV layouts differ: {header.fingerprint!r} was sent, {self._fingerprint!r} is served here"
            )
        if header.handle in self._open:
            raise TransferFailed(f"KV handle {header.handle} is in use")
        if (end := self._ended.get(header.handle)) is not None:
            raise TransferFailed(f"KV handle {header.handle} {end}")
        self._open[header.handle] = _Handle(header, abort, header.uses)

    def ready(self, name: str, region: Region) -> None:
        """Takes over `region` with all bytes, verified. Raises TransferFailed if the handle has ended."""
        handle = self._open.get(name)
        if handle is None:
            raise TransferFailed(f"KV handle {name} {self._ended.get(name, 'is unknown')}")
        handle.region = region
        handle.settled.set()
        self._renew(handle)

    def fail(self, name: str, reason: str) -> None:
        """Ends the arriving handle `name`. `reason` completes the sentence "it failed to arrive: "."""
        if (handle := self._open.get(name)) is not None and handle.region is None:
            self._end(handle, f"failed to arrive: {reason}")

    async def claim(
        self, name: str, *, adapter_digest: str, prompt_hash: bytes, num_tokens: int, timeout: float
    ) -> Claim:
        """Takes one use of the handle's KV; waits up to `timeout` seconds for an arriving handle.

        Raises TransferFailed if the handle is unknown, ended or used up, or was made for another adapter or prompt.
        """
        handle = self._claimable(name)
        header = handle.header
        for what, sent, wanted in (
            ("adapter", header.adapter_digest, adapter_digest),
            ("number of prompt tokens", header.num_tokens, num_tokens),
            ("prompt", header.prompt_hash, prompt_hash),
        ):
            if sent != wanted:
                raise TransferFailed(f"KV handle {name} was made for another {what}")
        try:
            async with asyncio.timeout(timeout):
                await handle.settled.wait()
        except TimeoutError:
            raise TransferFailed(f"KV handle {name} did not arrive within {timeout:g} s") from None
        handle = self._claimable(name)
        assert handle.region is not None
        claim = Claim(self, handle, handle.region)
        handle.claims.add(claim)
        handle.loading += 1
        handle.unclaimed -= 1
        self._renew(handle)
        return claim

    def release(self, name: str) -> None:
        """Ends further claims. An arriving push is aborted, and a later one refused. Open claims go on."""
        self._give_up(name, "was released")

    def close(self) -> None:
        """Ends every handle and frees its memory, even with open claims."""
        for name, handle in list(self._open.items()):
            handle.claims.clear()
            self._give_up(name, "ended with its worker")

    def _claimable(self, name: str) -> _Handle:
        handle = self._open.get(name)
        if handle is None:
            raise TransferFailed(f"KV handle {name} {self._ended.get(name, 'is unknown')}")
        if not handle.unclaimed:
            raise TransferFailed(f"KV handle {name} has no uses left of {handle.header.uses}")
        return handle

    def _renew(self, handle: _Handle) -> None:
        if handle.lease is not None:
            handle.lease.cancel()
            handle.lease = None
        if handle.unclaimed:
            end = f"expired: nobody claimed it within {self._lease:g} s"
            loop = asyncio.get_running_loop()
            handle.lease = loop.call_later(self._lease, self._give_up, handle.header.handle, end)

    def _give_up(self, name: str, end: str) -> None:
        handle = self._open.get(name)
        if handle is None:
            self._remember(name, end)
        elif handle.claims:
            handle.unclaimed = 0
            self._renew(handle)
            self._settle(handle)
        else:
            if handle.region is None:
                handle.abort(end)
            self._end(handle, end)

    def _settle(self, handle: _Handle) -> None:
        """Frees the region after the last claim, or makes it evictable once all claims have loaded."""
        if handle.unclaimed or handle.region is None or self._open.get(handle.header.handle) is not handle:
            return
        if not handle.claims:
            self._end(handle, "is used up")
        elif not handle.loading:

            def on_evict() -> None:
                handle.evicted = True

            self._arena.mark_evictable(handle.region, on_evict)

    def _end(self, handle: _Handle, end: str) -> None:
        del self._open[handle.header.handle]
        self._remember(handle.header.handle, end)
        if handle.lease is not None:
            handle.lease.cancel()
        handle.settled.set()
        if handle.region is not None:
            self._arena.release(handle.region)

    def _remember(self, name: str, end: str) -> None:
        self._ended.setdefault(name, end)
        while len(self._ended) > REMEMBERED:
            self._ended.popitem(last=False)
