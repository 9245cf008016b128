"""The decode side's KV handles: which are arriving or ready, who claimed them, and how the others ended.

Owns a ready handle's staging region until the last claim is closed. Doesn't receive bytes (`receive`), knows no gRPC.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from preft.core.errors import TransferFailed
from preft.transfer.port import KvHeader, PushRefused, Refusal
from preft.transfer.staging import Region, StagingArena

REMEMBERED = 4096  # ended handles whose end is remembered, for clear errors and against late pushes


@dataclass(slots=True, eq=False)
class _Handle:
    header: KvHeader
    abort: Callable[[str], None]
    unclaimed: int
    region: Region | None = None  # None while arriving: the bytes belong to whoever receives them
    evicted: bool = False
    claims: set[Claim] = field(default_factory=set)
    loading: int = 0  # claims whose engine request has no copy of its own yet
    settled: asyncio.Event = field(default_factory=asyncio.Event)  # ready or ended
    lease: asyncio.TimerHandle | None = None


class Claim:
    """One choice's right to a handle's KV. Close it, whatever happens."""

    def __init__(self, handles: HandleTable, handle: _Handle, region: Region) -> None:
        self._handles = handles
        self._handle = handle
        self.region = region
        self._loading = True

    @property
    def evicted(self) -> bool:
        """Whether the kept copy had to make room: the region is gone and can't be loaded again."""
        return self._handle.evicted

    def loaded(self) -> None:
        """The engine has its own copy now. Once all uses have one, the region may make room for others."""
        if self._loading:  # this comes with every token
            self._loading = False
            self._handle.loading -= 1
            self._handles._settle(self._handle)

    def close(self) -> None:
        """The request is over. Closing again does nothing."""
        self._handle.loading -= self._loading
        self._loading = False
        self._handle.claims.discard(self)
        self._handles._settle(self._handle)


class HandleTable:
    """All handles of one decode worker, for one asyncio loop.

    A handle is arriving (opened, its bytes are on their way), ready, or ended; of an ended one only the reason is kept.
    `lease` in seconds: how long a ready handle waits for its (next) claim before its unclaimed uses are given up.
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
        """Registers an arriving handle; if it's given up, `abort` is called with the reason. Raises PushRefused."""
        if (
            not header.handle
            or min(header.num_tokens, header.num_bytes, header.uses) < 1
            or len(header.prompt_hash) != 32
        ):
            raise PushRefused("the KV header is malformed", Refusal.MALFORMED)
        if header.fingerprint != self._fingerprint:
            raise PushRefused(
                f"the KV layouts differ: {header.fingerprint!r} was sent, {self._fingerprint!r} is served here",
                Refusal.MISMATCH,
            )
        if header.handle in self._open:
            raise PushRefused(f"KV handle {header.handle} is in use", Refusal.DUPLICATE)
        if (end := self._ended.get(header.handle)) is not None:
            raise PushRefused(f"KV handle {header.handle} {end}", Refusal.DUPLICATE)
        self._open[header.handle] = _Handle(header, abort, header.uses)

    def ready(self, name: str, region: Region) -> None:
        """All bytes are in `region`, verified; the table owns it now. Raises PushRefused if the handle has ended."""
        handle = self._open.get(name)
        if handle is None:
            raise PushRefused(f"KV handle {name} {self._ended.get(name, 'is unknown')}", Refusal.ABORTED)
        handle.region = region
        handle.settled.set()
        self._renew(handle)

    def fail(self, name: str, reason: str) -> None:
        """The arriving handle `name` will not become ready; `reason` completes the sentence "it failed to arrive: "."""
        if (handle := self._open.get(name)) is not None and handle.region is None:
            self._end(handle, f"failed to arrive: {reason}")

    async def claim(
        self, name: str, *, adapter_digest: str, prompt_hash: bytes, num_tokens: int, timeout: float
    ) -> Claim:
        """One use of the handle's KV; waits up to `timeout` seconds while it is arriving.

        Raises TransferFailed if the handle is unknown, failed, expired, given up or used up, or isn't for this adapter
        and prompt.
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
        """No (further) claims will come. An arriving push is aborted, a later one refused; open claims go on."""
        self._give_up(name, "was released")

    def close(self) -> None:
        """Ends every handle and frees its memory, claims or not."""
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
        """Frees or loosens the region of a handle whose claims have changed."""
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
