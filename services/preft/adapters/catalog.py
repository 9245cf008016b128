"""The AdapterCatalog: names, the version each points to, and the way in for new ones.

Owns no memory of its own: entries live in the state store, content in `storage`. What `get` and `list` read is a copy
of the store that `refresh` brings up to date; `watch` does so until it's cancelled.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Sequence
from pathlib import Path

from preft.adapters.base_model import BaseModel
from preft.adapters.folder import AdapterSummary, check_adapter, check_files
from preft.adapters.storage import keep_copy
from preft.core.cluster import Adapter
from preft.core.errors import AdapterExists, InvalidAdapter, ModelNotFound, PreftError
from preft.core.ports import StateStore

logger = logging.getLogger(__name__)

NOT_PREFILL_ONLY = (
    'its configuration doesn\'t say "prefill_only": true. Here an adapter acts on the prompt alone; '
    "one that was trained to act on the output too answers worse, up to not at all"
)
NAME = re.compile(r"[A-Za-z0-9._/-]{1,128}")


class Catalog:
    """An AdapterCatalog over `store`, whose checked copies lie in `folder`."""

    def __init__(
        self,
        store: StateStore,
        folder: Path,
        base: BaseModel,
        base_name: str,
        max_rank: int,
        max_bytes: int | None = None,
    ) -> None:
        """`base_name` is taken; `max_rank` is the highest rank served; larger folders than `max_bytes` are refused."""
        self._store = store
        self._folder = folder
        self._base = base
        self._base_name = base_name
        self._max_rank = max_rank
        self._max_bytes = max_bytes
        self._entries: list[Adapter] = []
        self._by_name: dict[str, Adapter] = {}

    def get(self, name: str) -> Adapter | None:
        """The version `name` points to, as of the last refresh."""
        return self._by_name.get(name)

    def list(self) -> Sequence[Adapter]:
        """All entries by name, as of the last refresh."""
        return tuple(self._entries)

    async def refresh(self) -> None:
        """Brings the copy up to date. Raises Unavailable if the store can't be read; then the old copy stays."""
        entries = await self._store.adapters()
        if entries != self._entries:
            self._entries = entries
            self._by_name = {adapter.name: adapter for adapter in entries}

    async def watch(self, interval: float) -> None:
        """Refreshes every `interval` seconds until cancelled, also through times when the store can't be read."""
        failing = False
        while True:
            await asyncio.sleep(interval)
            try:
                await self.refresh()
                failing = False
            except PreftError as error:
                if not failing:
                    logger.warning("the adapter catalog is not up to date: %s", error)
                failing = True

    async def add(self, name: str, source: str, *, replace: bool = False) -> Adapter:
        """Checks the folder `source`, keeps a copy and points `name` to it; equal content under the name is fine.

        Raises InvalidAdapter, AdapterExists (other content and no `replace`), Unavailable (disk or store).
        """
        self._check_name(name)
        digest, found = await asyncio.to_thread(self._keep, Path(source))
        path = str(self._folder / digest)
        if not found.prefill_only:
            logger.warning("adapter %r: %s", name, NOT_PREFILL_ONLY)
        adapter = Adapter(name, digest, path, source, found.rank, found.kind, found.prefill_only, time.time())
        while True:
            current = await self._stored(name)
            if current is not None and current.digest == digest and current.path == path:
                break
            if current is not None and current.digest != digest and not replace:
                raise AdapterExists(f"adapter {name!r} exists with other content: remove it first, or replace it")
            if await self._store.put_adapter(adapter, expect_digest=current.digest if current else ""):
                current = adapter
                break
        await self.refresh()
        return current

    async def remove(self, name: str) -> Adapter:
        """Forgets `name`. Its content stays on disk: running requests finish on it. Raises ModelNotFound."""
        current = await self._stored(name)
        if current is None or not await self._store.delete_adapter(name):
            raise ModelNotFound(f"no adapter is named {name!r}")
        await self.refresh()
        return current

    def _check_name(self, name: str) -> None:
        if not NAME.fullmatch(name):
            raise InvalidAdapter(
                f"{name!r} can't name an adapter: use 1 to 128 letters, digits, '.', '_', '/' or '-'", param="name"
            )
        if name == self._base_name:
            raise InvalidAdapter(f"{name!r} is the base model's name: give the adapter another", param="name")

    def _keep(self, source: Path) -> tuple[str, AdapterSummary]:
        check_files(source, self._max_bytes)
        return keep_copy(source, self._folder, lambda copy: check_adapter(copy, self._base, self._max_rank))

    async def _stored(self, name: str) -> Adapter | None:
        """The entry as the store has it now: other processes may have changed it since the last refresh."""
        return next((adapter for adapter in await self._store.adapters() if adapter.name == name), None)
