"""The AdapterCatalog: names, the version each points to, and the way in for new ones.

Owns no memory of its own: entries live in the state store, content in its source and, for as long as there is room, in
the disk tier. What `get` and `list` read is a copy of the store that `refresh` brings up to date.
"""

from __future__ import annotations

import asyncio
import logging
import math
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from preft.adapters.archive import unpack_archive
from preft.adapters.base_model import BaseModel
from preft.adapters.disk_tier import DiskTier
from preft.adapters.fetch_threads import FetchThreads
from preft.adapters.folder import AdapterSummary, check_adapter
from preft.adapters.folder_texts import text_warnings
from preft.adapters.source_limits import SourceLimits
from preft.adapters.sources import AdapterSource, open_source
from preft.core.cluster import Adapter
from preft.core.errors import AdapterExists, InvalidAdapter, InvalidRequest, ModelNotFound, PreftError, Unavailable
from preft.core.names import adapter_name, normal_name
from preft.core.ports import Progress, StateStore

T = TypeVar("T")

logger = logging.getLogger(__name__)

PINNED_SHARE = 0.5  # of host memory and of the disk tier: what isn't pinned needs room as well


class CatalogView:
    """The catalog as one process sees it: up to date to the last `refresh`, and free to read."""

    def __init__(self, store: StateStore, max_age: float = math.inf) -> None:
        """`get` and `list` raise Unavailable once the last `refresh` is more than `max_age` seconds ago."""
        self._store = store
        self._max_age = max_age
        self._read_at = time.monotonic()
        self._revision = 0
        self._by_name: dict[str, Adapter] = {}
        self._names_of: dict[str, set[str]] = {}  # by digest
        self._sorted: tuple[Adapter, ...] | None = ()
        self.pinned: frozenset[str] = frozenset()  # digests

    def get(self, name: str) -> Adapter | None:
        """The version `name` points to."""
        self._check_age()
        return self._by_name.get(normal_name(name))

    def list(self) -> Sequence[Adapter]:
        """All entries by name; the same object until something changes."""
        self._check_age()
        if self._sorted is None:
            self._sorted = tuple(adapter for _, adapter in sorted(self._by_name.items()))
        return self._sorted

    async def refresh(self) -> Collection[str]:
        """Brings the copy up to date; returns the digests that no name points to any more.

        Raises Unavailable if the store can't be read; then the old copy stays.
        """
        asked = time.monotonic()
        changes = await self._store.adapter_changes(self._revision)
        self._read_at = max(self._read_at, asked)
        if changes.revision <= self._revision:
            return ()  # another refresh was quicker
        self._revision = changes.revision
        left = set()
        for name in (*changes.removed, *(adapter.name for adapter in changes.put)):
            old = self._by_name.pop(name, None)
            if old is not None:
                names = self._names_of[old.digest]
                names.discard(name)
                if not names:
                    del self._names_of[old.digest]
                    left.add(old.digest)
        for adapter in changes.put:
            self._by_name[adapter.name] = adapter
            self._names_of.setdefault(adapter.digest, set()).add(adapter.name)
            left.discard(adapter.digest)
        self._sorted = None
        self.pinned = frozenset(adapter.digest for adapter in self._by_name.values() if adapter.pinned)
        return left

    @property
    def revision(self) -> int:
        """Changes with each `refresh` that found something new."""
        return self._revision

    def _check_age(self) -> None:
        age = time.monotonic() - self._read_at
        if age > self._max_age:
            raise Unavailable(
                f"the adapter catalog could not be read for {age:.0f} seconds and may be out of date: try again later"
            )


@dataclass(frozen=True, slots=True)
class CatalogLimits:
    """`max_rank`: the highest rank served. `pinned_bytes`: of all pinned adapters. `sources`: of what is added.

    `max_age`: seconds without a look at the store, after which nothing is said about names any more.
    """

    max_rank: int
    pinned_bytes: int
    max_adapter_bytes: int
    sources: SourceLimits
    max_age: float = math.inf


class Catalog(CatalogView):
    """An AdapterCatalog over `store`. New content is checked in the disk tier.

    It comes in threads of the catalog's own, which nothing else waits for. An add that is cancelled first ends its
    work there, and leaves nothing half-fetched.
    """

    def __init__(
        self,
        store: StateStore,
        disk: DiskTier,
        uploads: Path,
        base: BaseModel,
        base_name: str,
        limits: CatalogLimits,
    ) -> None:
        """`uploads` is where the content of archives stays; `base_name` is taken."""
        super().__init__(store, limits.max_age)
        self._disk = disk
        self._uploads = uploads.absolute()
        self._base = base
        self._base_name = base_name
        self._limits = limits
        self._writing = asyncio.Lock()
        self._threads = FetchThreads("adapter-add")

    async def refresh(self) -> Collection[str]:
        left = await super().refresh()
        self._disk.pinned = self.pinned
        return left

    async def add(self, name: str, source: str, *, replace: bool = False, progress: Progress | None = None) -> Adapter:
        """Fetches `source` and checks it, and points `name` to it; equal content under the name is fine.

        What the name has from there already, and what hasn't changed since, isn't fetched again.

        Raises InvalidAdapter, SourceNotFound, AdapterExists (other content and no `replace`), Unavailable, and
        InvalidRequest if the name is pinned and there is no room for its new content.
        """
        name = self._new_name(name)
        stop = threading.Event()
        opened = open_source(source, self._limits.sources, stop=stop)
        known = self.get(name)
        adapter = await self._threads.run(opened.place, lambda: self._fetch(name, opened, known, progress), stop)
        return await self._put(adapter, replace)

    def has_copy(self, adapter: Adapter) -> bool:
        """Whether this machine holds the content of `adapter`, whatever has become of its source."""
        return self._disk.has(adapter.digest)

    async def add_archive(self, name: str, archive: Path, *, replace: bool = False) -> Adapter:
        """Like `add`, with the content of a tar or zip file, which stays until no name points to it any more."""
        self._new_name(name)
        stop = threading.Event()
        folder = self._uploads / uuid.uuid4().hex
        try:
            await self._threads.run("", lambda: self._unpack(archive, folder, stop), stop)
            return await self.add(name, str(folder), replace=replace)
        except (PreftError, asyncio.CancelledError):
            with suppress(PreftError):
                await self._drop_upload(str(folder))
            raise

    async def pin(self, name: str, pinned: bool) -> Adapter:
        """Keeps the adapter in host memory and on disk, or no longer.

        Raises ModelNotFound, and InvalidRequest if there is no room for it beside the other pinned ones.
        """
        async with self._writing:
            while True:
                current = await self._store.adapter(normal_name(name))
                if current is None:
                    raise ModelNotFound(f"no adapter is named {name!r}")
                changed = replace(current, pinned=pinned)
                if pinned and not current.pinned:
                    await self._check_pinned(changed)
                if await self._store.put_adapter(changed, expect=current):
                    await self.refresh()
                    return changed

    async def remove(self, name: str) -> Adapter:
        """Forgets `name`. Requests that run finish on its content. Raises ModelNotFound."""
        removed = await self._store.delete_adapter(normal_name(name))
        if removed is None:
            raise ModelNotFound(f"no adapter is named {name!r}")
        await self.refresh()
        await self._drop_upload(removed.source)
        return removed

    async def _put(self, adapter: Adapter, replacing: bool) -> Adapter:
        """Points the name to new content; what says the same as the present entry changes nothing."""
        async with self._writing:
            while True:
                current = await self._store.adapter(adapter.name)
                if current is None:
                    wanted = adapter
                elif current.digest == adapter.digest:
                    wanted = replace(current, source=adapter.source, stamp=adapter.stamp, warnings=adapter.warnings)
                elif replacing:
                    wanted = replace(adapter, version=current.version + 1, pinned=current.pinned)
                    if current.pinned and wanted.size > current.size:
                        await self._check_pinned(wanted)
                else:
                    raise AdapterExists(
                        f"adapter {adapter.name!r} exists with other content: remove it first, or replace it"
                    )
                if wanted == current or await self._store.put_adapter(wanted, expect=current):
                    break
            await self.refresh()
        if current is not None:
            await self._drop_upload(current.source)
        return wanted

    async def _check_pinned(self, adapter: Adapter) -> None:
        """Raises InvalidRequest if there is no room for this one beside the other pinned ones."""
        await self.refresh()
        sizes = {other.digest: other.size for other in self.list() if other.pinned and other.name != adapter.name}
        total = sum({**sizes, adapter.digest: adapter.size}.values())
        if total > self._limits.pinned_bytes:
            raise InvalidRequest(
                f"with {adapter.name!r} the pinned adapters have {total} bytes, more than the "
                f"{self._limits.pinned_bytes} that may be pinned: unpin another, or raise store.host_bytes",
                param="pinned",
            )

    def _new_name(self, text: str) -> str:
        """The name that `text` spells, if a new entry may have it. Raises InvalidAdapter."""
        name = adapter_name(text)
        if name == normal_name(self._base_name):
            raise InvalidAdapter(f"{name!r} is the base model's name: give the adapter another", param="name")
        return name

    def _fetch(self, name: str, source: AdapterSource, known: Adapter | None, progress: Progress | None) -> Adapter:
        stamp = source.stamp()
        if known is not None and self._is_unchanged(known, source.uri, stamp):
            return known
        digest, found = self._disk.fetch(source, self._check, progress=progress)
        warnings = (*found.warnings, *text_warnings(source.text_files(), self._base.texts))
        for warning in warnings:
            logger.warning("adapter %r: %s", name, warning)
        return Adapter(
            name,
            digest,
            source.uri,
            found.rank,
            found.kind,
            found.prefill_only,
            created=time.time(),
            size=found.size,
            stamp=stamp,
            warnings=warnings,
        )

    def _is_unchanged(self, known: Adapter, uri: str, stamp: str) -> bool:
        """Whether fetching it again would bring what is here, and what would pass again."""
        same = stamp != "" and (known.source, known.stamp) == (uri, stamp)
        return same and known.rank <= self._limits.max_rank and self._disk.find(known.digest) is not None

    def _check(self, copy: Path) -> AdapterSummary:
        return check_adapter(copy, self._base, self._limits.max_rank)

    def _unpack(self, archive: Path, target: Path, stop: threading.Event) -> None:
        """The archive's content in the folder `target`, which no other upload shares."""
        try:
            self._uploads.mkdir(mode=0o700, parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self._uploads, prefix=".unfinished-") as unpacked:
                folder = Path(unpacked) / "adapter"
                folder.mkdir()
                unpack_archive(archive, folder, self._limits.max_adapter_bytes, stop)
                self._check(folder)
                folder.rename(target)
        except OSError as error:
            logger.warning("an archive can't be kept in %s: %s", self._uploads, error)
            raise Unavailable(f"the archive can't be kept on the server's disk: {error.strerror or error}") from error

    async def _drop_upload(self, source: str) -> None:
        """Removes the content of an archive that no name has as its source any more."""
        if Path(source).parent != self._uploads:
            return
        await self.refresh()
        if all(entry.source != source for entry in self._by_name.values()):
            await asyncio.to_thread(shutil.rmtree, source, ignore_errors=True)
