"""The AdapterCatalog: adapter names, the version that each name points to, and the way to add adapters.

The catalog owns no data. Entries live in the state store. Content lives in its source, and in the disk tier while there
is room. Reads come from the process's copy of the store's entries (`view`).
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
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from preft.adapters.catalog.view import CatalogView
from preft.adapters.formats.base_model import BaseModel
from preft.adapters.formats.folder import AdapterSummary, check_adapter
from preft.adapters.formats.folder_texts import text_warnings
from preft.adapters.sources.archive import unpack_archive
from preft.adapters.sources.fetch_threads import FetchThreads
from preft.adapters.sources.limits import SourceLimits, SourceRules
from preft.adapters.sources.source import AdapterSource, open_source
from preft.adapters.store.disk_tier import DiskTier
from preft.core.cluster import Adapter
from preft.core.errors import (
    AdapterExists,
    InvalidAdapter,
    InvalidRequest,
    ModelNotFound,
    PreftError,
    TooManyBytes,
    Unavailable,
)
from preft.core.names import catalog_name, normal_name, split_name
from preft.core.ports import Progress, StateStore

T = TypeVar("T")

logger = logging.getLogger(__name__)

PINNED_SHARE = 0.5  # of host memory and of the disk tier: adapters that aren't pinned need room as well


@dataclass(frozen=True, slots=True)
class CatalogLimits:
    """`max_rank` is the highest rank served. `pinned_bytes` bounds all pinned adapters together.

    `sources` limits where new shared adapters may come from, `tenant_sources` the same for tenants' adapters: only
    places that are meant for every tenant. `max_age`: seconds without a refresh until reads fail.
    """

    max_rank: int
    pinned_bytes: int
    max_adapter_bytes: int
    sources: SourceLimits
    max_age: float = math.inf
    tenant_sources: SourceLimits = field(default_factory=lambda: SourceLimits(rules=SourceRules(())))


class Catalog(CatalogView):
    """An AdapterCatalog over `store`. New content is checked in the disk tier.

    The catalog has its own threads for fetching. A cancelled `add` waits until its fetch has stopped, and leaves no
    unfinished copy.
    """

    def __init__(
        self,
        store: StateStore,
        disk: DiskTier,
        uploads: Path,
        base: BaseModel,
        base_name: str,
        limits: CatalogLimits,
        upload_prefix: str = "",
    ) -> None:
        """`uploads` keeps the content of archives, in folders whose names begin with `upload_prefix`.

        `base_name` can't be an adapter's name.
        """
        super().__init__(store, limits.max_age)
        self._disk = disk
        self._uploads = uploads.absolute()
        self._base = base
        self._base_name = base_name
        self._limits = limits
        self._upload_prefix = upload_prefix
        self._writing = asyncio.Lock()
        self._threads = FetchThreads("adapter-add")

    async def refresh(self) -> Collection[str]:
        left = await super().refresh()
        self._disk.pinned = self.pinned
        return left

    async def add(
        self,
        name: str,
        source: str,
        *,
        replace: bool = False,
        progress: Progress | None = None,
        tenant_bytes: int | None = None,
    ) -> Adapter:
        """Fetches and checks `source`, and points `name` to its content. Equal content under the name is no error.

        Of a source whose stamp is that of the name's version, no byte is read; equal content isn't written again.

        Raises InvalidAdapter, SourceNotFound, AdapterExists (other content and no `replace`), Unavailable,
        InvalidRequest if the name is pinned and its new content has no room, and TooManyBytes.
        """
        name = self._new_name(name)
        limits = self._limits.tenant_sources if split_name(name)[0] else self._limits.sources
        return await self._add(name, source, limits, replace, progress, tenant_bytes)

    async def _add(
        self,
        name: str,
        source: str,
        limits: SourceLimits,
        replace: bool,
        progress: Progress | None,
        tenant_bytes: int | None,
    ) -> Adapter:
        stop = threading.Event()
        opened = open_source(source, limits, stop=stop)
        known = self.get(name)
        adapter = await self._threads.run(opened.place, lambda: self._fetch(name, opened, known, progress), stop)
        return await self._put(adapter, replace, tenant_bytes)

    def has_copy(self, adapter: Adapter) -> bool:
        """Whether this machine's disk tier holds the content of `adapter`."""
        return self._disk.has(adapter.digest)

    def folders(self, digest: str) -> list[AdapterSource]:
        """The local folders that may hold the content: its copy on disk, then the sources of entries.

        Raises InvalidRequest for an invalid digest.
        """
        found = self._disk.folders(digest)
        for entry in self.entries(digest):
            with suppress(InvalidAdapter):  # the source is no longer allowed
                source = open_source(entry.source, self._limits.sources)
                if not source.place:
                    found.append(source)
        return found

    async def add_archive(
        self, name: str, archive: Path, *, replace: bool = False, tenant_bytes: int | None = None
    ) -> Adapter:
        """Like `add`, from a tar or zip file. The content stays until no entry has this upload as its source."""
        name = self._new_name(name)
        stop = threading.Event()
        folder = self._uploads / f"{self._upload_prefix}{uuid.uuid4().hex}"
        try:
            await self._threads.run("", lambda: self._unpack(archive, folder, stop), stop)
            return await self._add(name, str(folder), self._limits.sources, replace, None, tenant_bytes)
        except (PreftError, asyncio.CancelledError):
            with suppress(PreftError):
                await self._drop_upload(str(folder))
            raise

    async def pin(self, name: str, pinned: bool) -> Adapter:
        """Keeps the adapter in host memory and on disk, or, if not `pinned`, no longer does.

        Raises ModelNotFound, and InvalidRequest if the pinned adapters would exceed `pinned_bytes`.
        """
        async with self._writing:
            await self.refresh()  # first puts back what the store has lost
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
        """Removes `name`. Running requests finish with its content. Raises ModelNotFound."""
        await self.refresh()
        removed = await self._store.delete_adapter(normal_name(name))
        if removed is None:
            raise ModelNotFound(f"no adapter is named {name!r}")
        await self.refresh()
        await self._drop_upload(removed.source)
        return removed

    async def _put(self, adapter: Adapter, replacing: bool, tenant_bytes: int | None) -> Adapter:
        """Points the name to new content. An entry equal to the present one changes nothing."""
        async with self._writing:
            await self.refresh()
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
                grows = current is None or wanted.size > current.size
                self._check_tenant(wanted, tenant_bytes if grows else None)
                if wanted == current or await self._store.put_adapter(wanted, expect=current):
                    break
            await self.refresh()
            try:  # another gateway may have added to the tenant's adapters meanwhile
                self._check_tenant(wanted, tenant_bytes if grows else None)
            except TooManyBytes:
                await self._take_back(wanted, current)
                raise
        if current is not None:
            await self._drop_upload(current.source)
        return wanted

    def _check_tenant(self, adapter: Adapter, limit: int | None) -> None:
        """Raises TooManyBytes if `adapter` and the other adapters of its tenant exceed `limit` bytes."""
        if limit is None:
            return
        tenant, name = split_name(adapter.name)
        others = (one.size for one in self.list() if one.name != adapter.name and split_name(one.name)[0] == tenant)
        total = adapter.size + sum(others)
        if total > limit:
            raise TooManyBytes(
                f"with {name!r} the adapters of {tenant!r} would have {total} bytes, more than the {limit} that this "
                "API key allows: remove another adapter first"
            )

    async def _take_back(self, put: Adapter, before: Adapter | None) -> None:
        """Undoes `put`, unless the entry has changed again."""
        if before is not None:
            await self._store.put_adapter(before, expect=put)
        elif await self._store.adapter(put.name) == put:
            await self._store.delete_adapter(put.name)
        await self.refresh()

    async def _check_pinned(self, adapter: Adapter) -> None:
        """Raises InvalidRequest if `adapter` and the other pinned adapters exceed `pinned_bytes`."""
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
        """The normal form of `text`, if a new entry may have this name. Raises InvalidAdapter."""
        name = catalog_name(text)
        if split_name(name)[1] == normal_name(self._base_name):
            raise InvalidAdapter(f"{name!r} is the base model's name: give the adapter another", param="name")
        return name

    def _fetch(self, name: str, source: AdapterSource, known: Adapter | None, progress: Progress | None) -> Adapter:
        stamp = source.stamp()
        if known is not None and self._is_unchanged(known, source.uri, stamp):
            return known
        before = known.digest if known is not None else None
        digest, found = self._disk.fetch(source, self._check, known=before, progress=progress)
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
        """Whether a new fetch would bring the content that is on disk, and that content would pass the checks again."""
        same = stamp != "" and (known.source, known.stamp) == (uri, stamp)
        return same and known.rank <= self._limits.max_rank and self._disk.find(known.digest) is not None

    def _check(self, copy: Path) -> AdapterSummary:
        return check_adapter(copy, self._base, self._limits.max_rank)

    def _unpack(self, archive: Path, target: Path, stop: threading.Event) -> None:
        """Unpacks the archive to `target`, a folder for this upload alone, and checks the content."""
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
        """Removes an upload's content if no entry has the upload as its source."""
        if Path(source).parent != self._uploads:
            return
        await self.refresh()
        if all(entry.source != source for entry in self._by_name.values()):
            await asyncio.to_thread(shutil.rmtree, source, ignore_errors=True)
