"""One process's copy of the adapter catalog: it follows the state store, and survives a store that lost its catalog.

The copy is read at every request for an adapter. The store owns the entries.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import time
from collections.abc import Collection, Sequence

from preft.core.cluster import Adapter
from preft.core.errors import Unavailable
from preft.core.names import normal_name
from preft.core.ports import AdapterChanges, StateStore

logger = logging.getLogger(__name__)

KEPT_REMOVALS = 1000  # remembered here, to warn of removed entries that are back
PUT_BACK_AT_ONCE = 50


class CatalogView:
    """One process's copy of the catalog, as of its last `refresh`. Reads don't wait for the store.

    If the store has lost entries that the copy knows, the copy keeps them, and `refresh` puts them back into the store.
    Any number of processes may do so at once: an entry is put back only where the store has none, or an older one.
    """

    def __init__(self, store: StateStore, max_age: float = math.inf) -> None:
        """`get` and `list` raise Unavailable if the last `refresh` is more than `max_age` seconds ago."""
        self._store = store
        self._max_age = max_age
        self._read_at = time.monotonic()
        self._refreshing = asyncio.Lock()
        self._epoch: str | None = None  # None: nothing was read yet
        self._revision = 0
        self._by_name: dict[str, Adapter] = {}
        self._names_of: dict[str, set[str]] = {}  # by digest
        self._sorted: tuple[Adapter, ...] | None = ()
        self._left: set[str] = set()  # digests, for the next `refresh` that ends well
        self._lost: dict[str, Adapter] = {}  # by name: entries to put back; all are in `_by_name` too
        self._removed: dict[str, Adapter] = {}  # by name, oldest removal first
        self.pinned: frozenset[str] = frozenset()  # digests

    def get(self, name: str) -> Adapter | None:
        """The entry of `name`, or None."""
        self._check_age()
        return self._by_name.get(normal_name(name))

    def list(self) -> Sequence[Adapter]:
        """All entries, sorted by name; the same object until an entry changes."""
        self._check_age()
        if self._sorted is None:
            self._sorted = tuple(adapter for _, adapter in sorted(self._by_name.items()))
        return self._sorted

    def entries(self, digest: str) -> Sequence[Adapter]:
        """The entries whose content has this digest."""
        return [self._by_name[name] for name in self._names_of.get(digest, ())]

    async def watch(self, timeout: float) -> Collection[str]:
        """Waits until the store has changed, `timeout` seconds at most, and then refreshes. Returns as `refresh`."""
        await self._store.wait_changed(timeout)
        return await self.refresh()

    async def refresh(self) -> Collection[str]:
        """Updates the copy. Returns the digests that no name points to any more.

        Raises Unavailable if the store can't be used; the old copy then stays, and the next refresh goes on.
        """
        async with self._refreshing:
            await self._read()
            while self._lost:
                await self._put_back_some()
                await self._read()
            left, self._left = self._left, set()
            return left

    @property
    def age(self) -> float:
        """Seconds since the store was read last."""
        return time.monotonic() - self._read_at

    @property
    def revision(self) -> int:
        """Changes with each `refresh` that found changes."""
        return self._revision

    @property
    def epoch(self) -> str:
        """The name of the catalog's history; empty if the store has none yet."""
        return self._epoch or ""

    async def _read(self) -> None:
        asked = time.monotonic()
        changes = await self._store.adapter_changes(self._revision)
        self._read_at = asked
        if changes.is_whole and self._epoch is not None and changes.epoch != self._epoch:
            self._find_lost(changes)
        if (changes.epoch, changes.revision) != (self._epoch, self._revision):
            self._epoch, self._revision = changes.epoch, changes.revision
            self._apply(changes)

    def _find_lost(self, changes: AdapterChanges) -> None:
        """Notes every known entry that isn't in the store, or only as an earlier version."""
        stored = {adapter.name: adapter for adapter in changes.put}
        lost = {
            name: known
            for name, known in self._by_name.items()
            if name not in changes.removed and (name not in stored or stored[name].created < known.created)
        }
        if lost.keys() - self._lost.keys():
            counts = len(lost), len(self._by_name)
            logger.warning("the state store has lost its latest changes: %d of %d adapters are put back", *counts)
        self._lost = lost

    def _apply(self, changes: AdapterChanges) -> None:
        put = [adapter for adapter in changes.put if not self._is_older_than_lost(adapter)]
        for adapter in put:
            self._lost.pop(adapter.name, None)
        for name in changes.removed:
            self._lost.pop(name, None)
        there = {adapter.name for adapter in put}
        gone = self._by_name.keys() - there - self._lost.keys() if changes.is_whole else changes.removed
        for name in gone:
            self._forget(name)
        for adapter in put:
            self._take(adapter)
        self._left.difference_update(self._names_of)
        self._sorted = None
        self.pinned = frozenset(adapter.digest for adapter in self._by_name.values() if adapter.pinned)

    def _is_older_than_lost(self, adapter: Adapter) -> bool:
        lost = self._lost.get(adapter.name)
        return lost is not None and adapter.created < lost.created

    def _forget(self, name: str) -> None:
        """Removes an entry, and remembers it for a while."""
        old = self._drop(name)
        if old is not None:
            self._removed[name] = old
            if len(self._removed) > KEPT_REMOVALS:
                del self._removed[next(iter(self._removed))]

    def _take(self, adapter: Adapter) -> None:
        removed = self._removed.pop(adapter.name, None)
        if removed is not None and removed.created == adapter.created:
            logger.warning(
                "the adapter %r was removed and is back as it was, because the state store has lost the removal or a "
                "process put it back: remove it again if nobody wants it",
                adapter.name,
            )
        self._drop(adapter.name)
        self._by_name[adapter.name] = adapter
        self._names_of.setdefault(adapter.digest, set()).add(adapter.name)

    def _drop(self, name: str) -> Adapter | None:
        old = self._by_name.pop(name, None)
        if old is not None:
            names = self._names_of[old.digest]
            names.discard(name)
            if not names:
                del self._names_of[old.digest]
                self._left.add(old.digest)
        return old

    async def _put_back_some(self) -> None:
        """Puts some lost entries back, in random order: many processes at once share the work."""
        names = random.sample(sorted(self._lost), min(PUT_BACK_AT_ONCE, len(self._lost)))
        tries = await asyncio.gather(*(self._put_back(self._lost[name]) for name in names), return_exceptions=True)
        for name, error in zip(names, tries, strict=True):
            if error is None:
                self._lost.pop(name, None)
        for error in filter(None, tries):
            raise error

    async def _put_back(self, adapter: Adapter) -> None:
        """Puts the entry where there is none or an earlier one, unless another process removes the name meanwhile."""
        current = None
        while not await self._store.put_adapter(adapter, expect=current):
            current = await self._store.adapter(adapter.name)
            if current is None or current.created >= adapter.created:
                return

    def _check_age(self) -> None:
        age = time.monotonic() - self._read_at
        if age > self._max_age:
            raise Unavailable(
                f"the adapter catalog could not be read for {age:.0f} seconds and may be out of date: try again later"
            )
