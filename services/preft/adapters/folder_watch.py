"""Keeps a catalog in step with a folder of adapters: each subfolder is an adapter of that name.

Owns when a subfolder is whole enough to be taken, and what becomes of those that change or go; the catalog checks and
remembers them. The folder is right: what is removed from the catalog alone comes back. A folder without
adapters that had none before removes nothing, as a disk that isn't mounted looks the same.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from preft.adapters.sources import AdapterSource, open_source
from preft.core.cluster import Adapter
from preft.core.errors import InvalidAdapter, ModelNotFound, PreftError, Unavailable
from preft.core.names import adapter_name, normal_name
from preft.core.ports import AdapterCatalog

logger = logging.getLogger(__name__)

ADDED_AT_ONCE = 4
PAUSE = 10  # times as long as the look at the folder took


@dataclass(slots=True)
class _Look:
    """What one look at the folder found, by name, and what follows for the catalog.

    `stamps` of the subfolders that hold an adapter, `faults` of the others; `missing` are entries without a subfolder.
    """

    stamps: dict[str, str] = field(default_factory=dict)
    faults: dict[str, str] = field(default_factory=dict)
    missing: frozenset[str] = frozenset()
    to_add: list[str] = field(default_factory=list)
    to_remove: list[str] = field(default_factory=list)


class FolderWatch:
    """Watches `folder` for `catalog`: call `scan` again and again, one at a time, `pause()` seconds apart."""

    def __init__(self, folder: Path, catalog: AdapterCatalog, *, interval: float = 1.0) -> None:
        """`interval` is the least time between two rounds, in seconds."""
        self._folder = os.path.abspath(folder.expanduser())
        self._catalog = catalog
        self._interval = interval
        self._pause = interval
        self._last = _Look()
        self._folders: dict[str, str] = {}  # by name: the subfolder, whose spelling may not be the normal one
        self._sources: dict[str, AdapterSource] = {}
        self._added: dict[str, tuple[str, str]] = {}  # by name: the stamp, and the digest that it stood for
        self._refused: dict[str, str] = {}  # by name: the stamp
        self._told: dict[str, str] = {}  # by name: the last warning
        self._readable = True
        self._unmounted = False  # as of the last look
        self._filled: tuple[int, int] | None = None  # which folder it was when it last held an adapter

    def pause(self) -> float:
        """Seconds until the next round."""
        return self._pause

    async def scan(self) -> None:
        """One round. A subfolder is taken when two rounds in a row found the same in it, and gone when two miss it."""
        entries = {entry.name: entry for entry in self._catalog.list()}
        started = time.monotonic()
        try:
            look = await asyncio.to_thread(self._look, entries)
        except OSError as error:
            if self._readable:
                logger.warning("the adapter folder %s can't be read: %s", self._folder, error.strerror)
            self._readable = False
            return
        self._readable = True
        self._pause = max(self._interval, PAUSE * (time.monotonic() - started))
        self._last = look
        for name in look.to_remove:
            await self._remove(name)
        names = iter(look.to_add)
        async with asyncio.TaskGroup() as group:
            for _ in range(min(ADDED_AT_ONCE, len(look.to_add))):
                group.create_task(self._add_all(names))

    def _look(self, entries: Mapping[str, Adapter]) -> _Look:
        """Holds the folder against the catalog's entries. Raises OSError if it can't be listed."""
        with os.scandir(self._folder) as listing:
            self._folders = {normal_name(entry.name): entry.name for entry in listing if _may_be_folder(entry)}
        names = sorted(self._folders)
        look = _Look()
        for name in names:
            entry = entries.get(name)
            if fault := _name_fault(name):
                self._warn(name, f"it is left out: {fault}")
            elif entry is not None and not self._owns(entry):
                self._warn(name, f"it is left out, as the adapter of that name is from {entry.source}")
            else:
                self._look_at(name, entry, look)
        if look.stamps:
            self._filled = _identity(self._folder)
        missing = frozenset(name for name, entry in entries.items() if self._owns(entry)).difference(names)
        unmounted = bool(missing) and self._is_unmounted(look)
        if unmounted and not self._unmounted:
            logger.warning("no adapter is in %s: is its disk mounted? Those from there stay", self._folder)
        self._unmounted = unmounted
        look.missing = frozenset() if unmounted else missing
        look.to_remove = sorted(look.missing & self._last.missing)
        for memory in (self._sources, self._added, self._refused, self._told):
            for name in memory.keys() - set(names) - look.missing:
                del memory[name]
        return look

    def _is_unmounted(self, look: _Look) -> bool:
        """Whether no adapter is there, and none was in this very folder before: a disk that isn't there looks so."""
        return not look.stamps and self._filled != _identity(self._folder)

    def _look_at(self, name: str, entry: Adapter | None, look: _Look) -> None:
        if name not in self._sources:
            self._sources[name] = open_source(self._path(name))
        try:
            stamp = self._sources[name].stamp()
        except PreftError as error:
            look.faults[name] = str(error)
            if self._last.faults.get(name) == str(error):  # the first time it may be half copied
                self._warn(name, str(error))
            return
        look.stamps[name] = stamp
        if entry is not None and (entry.stamp == stamp or self._added.get(name) == (stamp, entry.digest)):
            self._told.pop(name, None)
        elif self._refused.get(name) != stamp and self._last.stamps.get(name) == stamp:
            look.to_add.append(name)

    async def _add_all(self, names: Iterator[str]) -> None:
        for name in names:
            entry = self._catalog.get(name)
            if entry is None or self._owns(entry):  # still
                await self._add(name, self._last.stamps[name])

    async def _add(self, name: str, stamp: str) -> None:
        try:
            entry = await self._catalog.add(name, self._path(name), replace=True)
        except Unavailable as error:
            self._warn(name, f"{error}; it will be tried again")
        except PreftError as error:
            self._refused[name] = stamp
            self._told.pop(name, None)
            self._warn(name, str(error))
        else:
            self._added[name] = (stamp, entry.digest)
            logger.info("adapter %r was taken from %s", name, self._folder)

    async def _remove(self, name: str) -> None:
        entry = self._catalog.get(name)
        if entry is None or not self._owns(entry):
            return
        try:
            await self._catalog.remove(name)
            logger.info("adapter %r was removed, as it is no longer in %s", name, self._folder)
        except ModelNotFound:
            pass  # somebody else was quicker
        except PreftError as error:
            self._warn(name, f"it is gone, but: {error}")

    def _owns(self, entry: Adapter) -> bool:
        return normal_name(entry.source) == normal_name(self._path(entry.name))

    def _path(self, name: str) -> str:
        return f"{self._folder.rstrip('/')}/{self._folders.get(name, name)}"

    def _warn(self, name: str, message: str) -> None:
        """Logs it, unless it was the last that was logged of this subfolder."""
        if self._told.get(name) != message:
            self._told[name] = message
            logger.warning("adapter folder %s: %s", self._path(name), message)


def _name_fault(name: str) -> str | None:
    """Why a subfolder's name can't be an adapter's."""
    if name.startswith("."):
        return "its name begins with '.'"
    try:
        adapter_name(name)
    except InvalidAdapter as error:
        return str(error)
    return None


def _identity(folder: str) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _may_be_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return True  # so that a disk that fails removes no adapter
