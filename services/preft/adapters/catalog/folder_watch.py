"""Keeps a catalog in step with a folder of adapters, in which each subfolder's name is an adapter's name.

The watch owns when to add, replace or remove an adapter; the catalog checks and stores it. The folder decides: an
adapter removed from the catalog alone comes back. A folder without adapters that has never held one causes no removals,
because the mount point of a disk that isn't mounted looks the same.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from preft.adapters.sources.source import AdapterSource, open_source
from preft.core.cluster import Adapter
from preft.core.errors import InvalidAdapter, ModelNotFound, PreftError, Unavailable
from preft.core.names import adapter_name, normal_name
from preft.core.ports import AdapterCatalog

logger = logging.getLogger(__name__)

ADDED_AT_ONCE = 4
PAUSE = 10  # least pause, in durations of the last scan


@dataclass(slots=True)
class _Look:
    """The result of one scan of the folder, by name, and the changes to the catalog that follow.

    `stamps` has the subfolders with an adapter, `faults` the other subfolders, `missing` the entries without a
    subfolder.
    """

    stamps: dict[str, str] = field(default_factory=dict)
    faults: dict[str, str] = field(default_factory=dict)
    missing: frozenset[str] = frozenset()
    to_add: list[str] = field(default_factory=list)
    to_remove: list[str] = field(default_factory=list)


class FolderWatch:
    """Watches `folder` for `catalog`. Call `scan` repeatedly, never concurrently, `pause()` seconds apart."""

    def __init__(self, folder: Path, catalog: AdapterCatalog, *, interval: float = 1.0) -> None:
        """`interval` is the shortest pause between two scans, in seconds."""
        self._folder = os.path.abspath(os.path.expanduser(folder))
        self._catalog = catalog
        self._interval = interval
        self._pause = interval
        self._last = _Look()
        self._folders: dict[str, str] = {}  # by normal name: the subfolder as it is spelled
        self._sources: dict[str, AdapterSource] = {}
        self._added: dict[str, tuple[str, str]] = {}  # by name: the stamp, and the digest of that content
        self._refused: dict[str, str] = {}  # by name: the stamp
        self._told: dict[str, str] = {}  # by name: the last warning
        self._readable = True
        self._unmounted = False  # as of the last scan
        self._filled: tuple[int, int] | None = None  # identity of the folder when it last held an adapter

    def pause(self) -> float:
        """Seconds until the next scan."""
        return self._pause

    async def scan(self) -> None:
        """Scans once. An adapter is added when two scans in a row found it equal, and removed when two missed it."""
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
        """Compares the folder with the catalog's entries. Raises OSError if the folder can't be listed."""
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
        """Whether this very folder (device and inode) has never held an adapter, as if its disk weren't mounted."""
        return not look.stamps and self._filled != _identity(self._folder)

    def _look_at(self, name: str, entry: Adapter | None, look: _Look) -> None:
        try:
            if name not in self._sources:
                self._sources[name] = open_source(self._path(name))
            stamp = self._sources[name].stamp()
        except PreftError as error:
            look.faults[name] = str(error)
            if self._last.faults.get(name) == str(error):  # at its first sight the folder may be half copied
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
            if entry is None or self._owns(entry):  # checked again, after earlier adds
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
            pass  # the entry was removed meanwhile
        except PreftError as error:
            self._warn(name, f"it is gone, but: {error}")

    def _owns(self, entry: Adapter) -> bool:
        return normal_name(entry.source) == normal_name(self._path(entry.name))

    def _path(self, name: str) -> str:
        return f"{self._folder.rstrip('/')}/{self._folders.get(name, name)}"

    def _warn(self, name: str, message: str) -> None:
        """Logs the message, unless it was the last one logged for this subfolder."""
        if self._told.get(name) != message:
            self._told[name] = message
            logger.warning("adapter folder %s: %s", self._path(name), message)


def _name_fault(name: str) -> str | None:
    """Why a subfolder's name can't be an adapter's name, or None."""
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
        return True  # a failing disk must not remove adapters
