"""One machine's folder of adapter copies, `<root>/<digest>/`, which evicts the least recently used copies.

All processes of the machine share the folder, and all state lies in it, so no process has to keep running. A copy gets
its name when it is complete, checked and of that digest; no process changes it afterwards. An unfinished copy lies in
`.unfinished-<id>-<bytes>/`, which the process that writes it keeps locked. An unlocked one was left behind by a
dead process, and is removed. A copy may be damaged after a power cut: readers check its digest. All calls block.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shutil
import threading
import uuid
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from preft.adapters.formats.digest import adapter_files, add_file_header, read_chunks
from preft.adapters.sources.source import AdapterSource, open_source
from preft.core.errors import InvalidAdapter, InvalidRequest, Unavailable
from preft.core.ports import Progress
from preft.core.request import DIGEST

logger = logging.getLogger(__name__)

T = TypeVar("T")

LOCK = ".lock"
UNFINISHED = ".unfinished-"
GROWTH = 8 << 20  # bytes reserved at a time for files of unknown size


class DiskTier:
    """The folder `root`, which holds `limit` bytes at most. Thread-safe."""

    def __init__(self, root: Path, limit: int, max_adapter_bytes: int) -> None:
        """Creates the folder if it is missing. Raises Unavailable if it can't be used."""
        self.root = root
        self.limit = limit
        self.pinned: Collection[str] = ()  # digests that are never evicted
        self.evictions = 0  # by this process
        self.bytes_seen = 0  # `used` as of this process's last change or full scan
        self._changes = -1  # the lock file's count of changes for which `bytes_seen` is valid
        self._mutex = threading.Lock()
        self._lock: int  # descriptor of the lock file, while locked
        self._max_adapter_bytes = max_adapter_bytes
        self._sizes: dict[str, int] = {}  # digest -> bytes of known copies, which never change
        with _disk_errors(root):
            root.mkdir(parents=True, exist_ok=True)
            with suppress(PermissionError):  # another user's folder
                root.chmod(0o700)  # adapters are personal
            self.used()

    def folder_of(self, digest: str) -> Path:
        """The path of a copy, present or not. Raises InvalidRequest for an invalid `digest`, as it becomes a path."""
        if not DIGEST.fullmatch(digest):
            raise InvalidRequest("an adapter's digest is 64 lowercase hexadecimal digits", param="digest")
        return self.root / digest

    def has(self, digest: str) -> bool:
        """Whether the copy is there. The call doesn't count as a use."""
        return self.folder_of(digest).is_dir()

    def find(self, digest: str) -> Path | None:
        """The copy's folder, or None; counts as a use. Open its files at once, as eviction can come at any time."""
        folder = self.folder_of(digest)
        try:
            os.utime(folder)
        except FileNotFoundError:
            return None
        except OSError as error:
            logger.warning("adapters can't be read from %s: %s", self.root, error)
            raise Unavailable(f"adapters can't be read from the server's disk: {error.strerror}") from error
        return folder

    def folders(self, digest: str) -> list[AdapterSource]:
        """The copy as a source, if there is one. Its content may be damaged. Raises as `find`."""
        folder = self.find(digest)
        return [] if folder is None else [open_source(str(folder))]

    def fetch(
        self,
        source: AdapterSource,
        check: Callable[[Path], T],
        *,
        digest: str | None = None,
        known: str | None = None,
        progress: Progress | None = None,
    ) -> tuple[str, T]:
        """Copies the files of `source`. Returns their digest and what `check` returned.

        `check` gets the copy, which no other process can change, and raises InvalidAdapter to refuse it. With `digest`,
        other content is refused. Nothing is written if the source equals the copy of the digest `known`; otherwise the
        source is read twice up to the first difference. Raises the errors of `AdapterSource`, InvalidAdapter if the
        adapter is too large or changes during the copy, and Unavailable if the disk is full or fails.
        """
        sizes = source.files()
        if known is not None and (equal := self._equal_copy(source, sizes, known, progress)):
            try:
                return known, check(equal)
            except InvalidAdapter:
                if self.has(known):  # else the copy was evicted during the check
                    raise
        self.check_size(sum(size or 0 for size in sizes.values()))
        with _disk_errors(self.root), self._unfinished(sum(size or 0 for size in sizes.values())) as copy:
            found = copy.fill(source, sizes, progress)
            if digest is not None and found != digest:
                raise InvalidAdapter(
                    f"{source.uri} no longer holds the version that was added: add the adapter again from there"
                )
            verdict = check(copy.path)
            self._finish(copy, found)
            return found, verdict

    def _equal_copy(
        self, source: AdapterSource, sizes: dict[str, int | None], digest: str, progress: Progress | None
    ) -> Path | None:
        """The folder of the copy, if it is there and has the files of `source`. Reads up to the first difference."""
        copy = self.find(digest)
        if copy is None or tuple(sizes) != adapter_files(copy):
            return None
        total = None if None in sizes.values() else sum(size or 0 for size in sizes.values())
        done = 0
        with suppress(FileNotFoundError), ExitStack() as stack:  # not found: evicted just now
            files = {name: stack.enter_context(open(copy / name, "rb")) for name in sizes}
            if any(size not in (None, os.fstat(files[name].fileno()).st_size) for name, size in sizes.items()):
                return None
            for name, file in files.items():
                for chunk in stack.enter_context(closing(source.read(name))):
                    if file.read(len(chunk)) != chunk:
                        return None
                    done += len(chunk)
                    if progress is not None:
                        progress(done, total)
                if file.read(1):
                    return None
            return copy
        return None

    def discard(self, digest: str) -> None:
        """Removes a damaged copy, if it is there."""
        with _disk_errors(self.root), self._locked():
            self._remove(digest)
            self._look()
            self._note(0)

    def used(self) -> int:
        """Bytes of all copies, plus bytes reserved for unfinished ones."""
        with _disk_errors(self.root), self._locked():
            return sum(self._look().values())

    @contextmanager
    def _unfinished(self, size: int) -> Iterator[_Unfinished]:
        with self._locked():
            self._make_room(size)
            copy = _Unfinished(self, size)
            self._note(size)
        try:
            yield copy
        finally:
            try:
                with self._locked():
                    self._catch_up()
                    self._note(copy.remove())
            finally:
                copy.close()

    def grow(self, copy: _Unfinished) -> None:
        """Reserves GROWTH more bytes for an unfinished copy, up to the limits."""
        size = min(copy.reserved + GROWTH, self._max_adapter_bytes, self.limit)
        with self._locked():
            more = size - copy.reserved
            self._make_room(more)
            copy.reserve(size)
            self._note(more)

    def _finish(self, copy: _Unfinished, digest: str) -> None:
        with self._locked():
            target = self.folder_of(digest)
            if target.exists():
                os.utime(target)  # another process finished the same content first
                return
            self._catch_up()
            os.utime(copy.path)  # its time is the creation of its last file, which may be long ago
            copy.rename(target)
            self._sizes[digest] = copy.written
            self._note(copy.written - copy.reserved)

    def check_size(self, size: int) -> None:
        """Raises InvalidAdapter if an adapter of `size` bytes is too large for the disk tier."""
        if size > self._max_adapter_bytes:
            raise InvalidAdapter(
                f"the adapter has more than {self._max_adapter_bytes} bytes, the limit of store.max_adapter_bytes"
            )
        if size > self.limit:
            raise InvalidAdapter(
                f"the adapter has more than {self.limit} bytes, which all copies on disk may have: "
                "raise store.disk_bytes"
            )

    # The following methods need the folder's lock.

    def _make_room(self, size: int) -> None:
        """Evicts copies until `size` more bytes fit. Raises Unavailable if eviction can't free enough."""
        self._catch_up()
        if self.bytes_seen + size <= self.limit:
            return
        sizes = self._look()
        used = sum(sizes.values())
        copies = [name for name in sizes if not name.startswith(UNFINISHED) and name not in self.pinned]
        if used + size - sum(sizes[name] for name in copies) > self.limit:
            raise Unavailable(
                f"the server keeps {self.limit} bytes of adapters, all taken by pinned ones and those on their way: "
                "try again later, or raise store.disk_bytes"
            )
        for name in sorted(copies, key=self._last_use):
            if used + size <= self.limit:
                break
            self._remove(name)
            self.evictions += 1
            used -= sizes[name]
            self._note(-sizes.pop(name))

    def _catch_up(self) -> None:
        """Scans the folder if another process has changed it. A scan of thousands of copies takes a while."""
        if self._changes != int.from_bytes(os.pread(self._lock, 8, 0), "little"):
            self._look()

    def _note(self, bytes_more: int) -> None:
        """Counts a change, which tells other processes that the folder has changed. Call `_catch_up` first.

        A process that is killed before this call may leave `bytes_seen` too high until the next full scan.
        """
        self.bytes_seen += bytes_more
        self._changes += 1
        os.pwrite(self._lock, self._changes.to_bytes(8, "little"), 0)

    def _look(self) -> dict[str, int]:
        """Scans the folder: bytes by folder name. Removes folders that dead processes left behind."""
        sizes = {}
        for name in os.listdir(self.root):
            if name.startswith(UNFINISHED):
                if not _left_behind(self.root / name):
                    sizes[name] = int(name.rpartition("-")[2])
            elif DIGEST.fullmatch(name):  # ignores other files
                sizes[name] = self._sizes.get(name) or self._measure(name)
        self._sizes = {name: size for name, size in sizes.items() if not name.startswith(UNFINISHED)}
        self._changes = int.from_bytes(os.pread(self._lock, 8, 0), "little")
        self.bytes_seen = sum(sizes.values())
        return sizes

    def _measure(self, name: str) -> int:
        with suppress(OSError):
            return sum(file.stat().st_size for file in os.scandir(self.root / name))
        return 0

    def _last_use(self, name: str) -> float:
        return self.folder_of(name).stat().st_mtime

    def _remove(self, digest: str) -> None:
        """Renames the copy first, so that no reader finds half of it. A process with its files open can read on."""
        gone = self.root / f"{UNFINISHED}{uuid.uuid4().hex}-0"
        with suppress(FileNotFoundError):
            self.folder_of(digest).rename(gone)
            shutil.rmtree(gone)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with self._mutex:
            self._lock = os.open(self.root / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX)
                yield
            finally:
                os.close(self._lock)


class _Unfinished:
    """An unfinished copy. Construct it with the tier locked."""

    def __init__(self, tier: DiskTier, size: int) -> None:
        self._tier = tier
        self._id = uuid.uuid4().hex
        self.reserved = size
        self.written = 0
        self.path = tier.root / f"{UNFINISHED}{self._id}-{size}"
        self.path.mkdir(mode=0o700)
        self._lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(self._lock, fcntl.LOCK_EX)

    def reserve(self, size: int) -> None:
        """Reserves `size` bytes in all, by putting the number into the folder's name."""
        self.rename(self._tier.root / f"{UNFINISHED}{self._id}-{size}")
        self.reserved = size

    def rename(self, target: Path) -> None:
        self.path.rename(target)
        self.path = target

    def fill(self, source: AdapterSource, sizes: dict[str, int | None], progress: Progress | None) -> str:
        """Copies the files and returns the digest of the copied bytes."""
        digest = hashlib.sha256()
        total = None if None in sizes.values() else sum(size or 0 for size in sizes.values())
        for name, size in sizes.items():
            if size is not None:
                add_file_header(digest, name, size)
            with open(self.path / name, "wb") as file:
                for chunk in source.read(name):
                    self.written += len(chunk)
                    self._tier.check_size(self.written)
                    if size is not None and file.tell() + len(chunk) > size:
                        raise _change_error(source, name)
                    while self.written > self.reserved:
                        self._tier.grow(self)
                    file.write(chunk)
                    if size is not None:
                        digest.update(chunk)
                    if progress is not None:
                        progress(self.written, total)
                length = file.tell()
            if size is None:
                add_file_header(digest, name, length)
                for chunk in read_chunks(self.path, name):
                    digest.update(chunk)
            elif length != size:
                raise _change_error(source, name)
            os.chmod(self.path / name, 0o400)
        return digest.hexdigest()

    def remove(self) -> int:
        """Removes an unfinished copy. Returns the change in reserved bytes: 0 or less."""
        if not self.path.name.startswith(UNFINISHED):
            return 0
        shutil.rmtree(self.path, ignore_errors=True)
        return -self.reserved

    def close(self) -> None:
        """Releases the lock. A copy that is still there then counts as left behind."""
        os.close(self._lock)


def _left_behind(folder: Path) -> bool:
    """Whether no process works on this unfinished copy. Such a copy is removed."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    else:
        shutil.rmtree(folder, ignore_errors=True)
        return True
    finally:
        os.close(descriptor)


def _change_error(source: AdapterSource, name: str) -> InvalidAdapter:
    return InvalidAdapter(f"{name} in {source.uri} changed while it was read: add it again when it is complete")


@contextmanager
def _disk_errors(root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        logger.warning("adapters can't be kept in %s: %s", root, error)
        raise Unavailable(f"adapters can't be kept on the server's disk: {error.strerror or error}") from error
