"""Takes an adapter's files, and nothing else, out of a tar or zip file that a user sent.

The archive is not trusted: a member's name only decides which of the adapter's files the member is, sizes are counted
while bytes arrive, and memory use is bounded. Other modules check the content, and whether the adapter is complete.
"""

from __future__ import annotations

import bz2
import gzip
import logging
import lzma
import os
import stat
import struct
import tarfile
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any, BinaryIO, cast

from preft.adapters.formats.digest import ADAPTER_FILES, CHUNK, LORA_FILES
from preft.adapters.formats.folder_texts import TEXT_BYTES, TEXT_FILES
from preft.adapters.formats.found_instead import explain
from preft.core.errors import InvalidAdapter, PreftError, Unavailable

logger = logging.getLogger(__name__)

MAX_ENTRIES = 10_000
MAX_READ = 16 << 20  # bytes that a header or a table of contents may claim
MARGIN = 1 << 20  # bytes of headers and padding in a tar file
MEMBER_TYPES = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # other types unpack a chunk of any size at once
BROKEN = (
    *(tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError),
    *(ValueError, KeyError, IndexError, OverflowError, RuntimeError, struct.error),
)


def unpack_archive(archive: Path, target: Path, max_bytes: int, stop: threading.Event | None = None) -> None:
    """Writes the adapter's files in `archive` to the empty folder `target`, and syncs them to the disk.

    The files lie at the top or in one folder of the archive; other files are ignored. Ignored files of a compressed
    tar file may have `max_bytes` more. Raises InvalidAdapter if the archive breaks these rules or is broken, and
    Unavailable if the disk fails or a thread sets `stop`. Files written before an error stay.
    """
    taken = _Taken(target, max_bytes, stop or threading.Event())
    with _errors(archive), open(archive, "rb") as file:
        start = file.read(8)
        file.seek(0)
        if start.startswith(b"PK"):
            _unpack_zip(file, taken)
        else:
            _unpack_tar(file, _opener(start), taken)
    taken.finish()


class _Taken:
    """The files taken so far, and the bytes in them."""

    def __init__(self, target: Path, max_bytes: int, stop: threading.Event) -> None:
        self.max_bytes = max_bytes
        self.stop = stop
        self._target = target
        self._left = max_bytes
        self._folders: dict[str, PurePosixPath] = {}
        self._texts: dict[str, PurePosixPath] = {}
        self._others: set[str] = set()

    def wants(self, name: str, regular: bool) -> bool:
        """Whether a member of this name is one of the adapter's files, or of the text files beside them.

        Raises InvalidAdapter for an adapter file that can't be taken.
        """
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            return False
        if path.name in TEXT_FILES and regular and path.name not in self._texts:
            self._texts[path.name] = path.parent
            return True
        if path.name not in ADAPTER_FILES:
            self._others.add(path.name)
            return False
        if not regular:
            raise _refusal(f"{name} in the archive is not a regular file: pack the file itself, not a link to it")
        if self._folders.get(path.name) == path.parent:
            raise _refusal(f"{name} is in the archive twice: pack it once")
        if any(folder != path.parent for folder in self._folders.values()):
            raise _refusal("the archive has adapter files in more than one folder: pack one adapter alone")
        self._folders[path.name] = path.parent
        return True

    def take(self, name: str, member: IO[bytes]) -> None:
        """Copies the member to the disk. Raises InvalidAdapter if the adapter exceeds the limit.

        Of a text file only the first TEXT_BYTES are copied, which don't count towards the limit.
        """
        path = self._target / PurePosixPath(name).name
        with _new_file(path) as write:
            if path.name in TEXT_FILES:
                write(member.read(TEXT_BYTES))
                return
            while chunk := member.read(CHUNK):
                self._left -= len(chunk)
                if self._left < 0:
                    raise _too_large(self.max_bytes)
                write(chunk)

    def finish(self) -> None:
        """Removes text files of other folders, and syncs the folder. Raises InvalidAdapter if no adapter was taken."""
        if not self._folders:
            instead = explain(self._others, "the archive")
            raise _refusal(instead or f"the archive has no adapter in it: pack {' and '.join(LORA_FILES)}")
        with _disk_errors(self._target):
            for name, folder in self._texts.items():
                if folder not in self._folders.values():
                    (self._target / name).unlink()
            descriptor = os.open(self._target, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


class _Reader:
    """The file that tarfile and zipfile read: bounded in total and per read, and unreadable once `stop` is set."""

    def __init__(self, file: IO[bytes], limit: int | None, taken: _Taken) -> None:
        self._file = file
        self._limit = limit
        self._taken = taken
        self.last = b""

    def read(self, size: int = -1) -> bytes:
        """The next `size` bytes; fewer at the end of the file."""
        self.last = self._file.read(min(size, MAX_READ + 1) if size >= 0 else MAX_READ + 1)
        if len(self.last) > MAX_READ:
            raise ValueError(f"a header claims more than {MAX_READ} bytes")
        self._check(self._file.tell())
        return self.last

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Sets and returns the position of the next read."""
        if whence == os.SEEK_SET:
            if offset < 0:
                raise ValueError("a header points to before the start")
            self._check(offset)  # first: a seek in a compressed file unpacks all bytes up to `offset`
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def seekable(self) -> bool:
        return True

    def _check(self, offset: int) -> None:
        if self._limit is not None and offset > self._limit:
            raise _too_large(self._taken.max_bytes)
        if self._taken.stop.is_set():
            raise Unavailable("the archive is not unpacked any further: nobody waits for it")


def _unpack_tar(file: BinaryIO, opener: Callable[[BinaryIO], IO[bytes]] | None, taken: _Taken) -> None:
    with opener(file) if opener else file as unpacked:
        reader = _Reader(unpacked, 2 * taken.max_bytes + MARGIN if opener else None, taken)
        with tarfile.open(fileobj=cast(Any, reader), mode="r:") as members:
            for count, member in enumerate(members, 1):
                _check_count(count)
                if taken.wants(member.name, member.isreg()):
                    content = members.extractfile(member)
                    assert content is not None
                    taken.take(member.name, content)
            # tarfile takes a damaged header for the end of the archive; a real end is a block of zeros.
            if reader.last != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError("it ends without an end mark")
            if opener:
                while reader.read(CHUNK):  # the checksum of a compressed file is at its end
                    pass


def _unpack_zip(file: BinaryIO, taken: _Taken) -> None:
    reader = _Reader(file, None, taken)
    with zipfile.ZipFile(cast(Any, reader)) as members:
        _check_count(len(members.infolist()))
        for member in members.infolist():
            kind = stat.S_IFMT(member.external_attr >> 16)  # 0 where it was packed on Windows
            if not taken.wants(member.filename, kind in (0, stat.S_IFREG) and not member.is_dir()):
                continue
            if member.flag_bits & 1:
                raise _refusal("the archive is encrypted: pack the adapter without a password")
            if member.compress_type not in MEMBER_TYPES:
                raise _refusal(f"{member.filename} is packed in a way that isn't read here: use deflate, or a tar file")
            with members.open(member) as content:
                taken.take(member.filename, content)


def _opener(start: bytes) -> Callable[[BinaryIO], IO[bytes]] | None:
    """The decompressor for a file that starts with `start`; None if the file isn't compressed."""
    if start.startswith(b"\x1f\x8b"):
        return cast(Callable[[BinaryIO], IO[bytes]], gzip.open)
    if start.startswith(b"BZh"):
        return cast(Callable[[BinaryIO], IO[bytes]], bz2.open)
    if start.startswith(b"\xfd7zXZ\0"):
        return cast(Callable[[BinaryIO], IO[bytes]], lzma.open)
    if start.startswith(b"\x28\xb5\x2f\xfd"):
        raise _refusal("archives packed with zstd are not read here: use gzip, xz or zip")
    return None


def _check_count(count: int) -> None:
    if count > MAX_ENTRIES:
        raise _refusal(f"the archive has more than {MAX_ENTRIES} files: pack the adapter's files alone")


@contextmanager
def _new_file(path: Path) -> Iterator[Callable[[bytes], object]]:
    """Yields a function that writes to the new file; on exit the file is synced to the disk."""
    with _disk_errors(path):
        file = open(path, "xb")  # noqa: SIM115 - closed below, within its own errors
    try:

        def write(chunk: bytes) -> None:
            with _disk_errors(path):
                file.write(chunk)

        yield write
        with _disk_errors(path):
            file.flush()
            os.fsync(file.fileno())
    finally:
        with _disk_errors(path):
            file.close()


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        logger.warning("%s can't be written: %s", path, error)
        raise Unavailable(f"the archive can't be unpacked on the server's disk: {error.strerror}") from error


@contextmanager
def _errors(archive: Path) -> Iterator[None]:
    try:
        yield
    except PreftError:
        raise
    except OSError as error:
        if error.errno is not None:
            logger.warning("%s can't be read: %s", archive, error)
            raise Unavailable(f"the archive can't be read from the server's disk: {error.strerror}") from error
        raise _broken(error) from error  # raised by a decompressor
    except BROKEN as error:
        raise _broken(error) from error


def _broken(error: Exception) -> InvalidAdapter:
    reason = " ".join(str(error).split()) or type(error).__name__
    return _refusal(f"the archive is no tar or zip file, or a broken one: {reason}")


def _too_large(max_bytes: int) -> InvalidAdapter:
    return _refusal(f"the archive unpacks to more than the limit of {max_bytes} bytes: pack the adapter's files alone")


def _refusal(message: str) -> InvalidAdapter:
    return InvalidAdapter(message, param="archive")
