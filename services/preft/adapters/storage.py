"""The folder of verified adapter copies, one subfolder per content digest: `<root>/<digest>/`.

A copy is complete and checked before it gets its final name, and never changed after it. Every function blocks.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from preft.adapters.digest import adapter_digest, adapter_files, add_file_header, file_size, read_chunks
from preft.core.errors import InvalidAdapter, Unavailable

T = TypeVar("T")

UNFINISHED = ".unfinished-"
UNFINISHED_SECONDS = 3600.0  # a copy that is older was left behind by a process that is gone


def keep_copy(source: Path, root: Path, check: Callable[[Path], T]) -> tuple[str, T]:
    """Copies the adapter in `source` to `root/<digest>/`, unless it is there; returns the digest and what `check` said.

    `check` is given the copy, so that nobody can change what was checked, and raises InvalidAdapter to refuse it. Links
    in `source` are followed. Raises InvalidAdapter if the source can't be read or changes meanwhile, Unavailable if the
    copy can't be written.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(root)
        copy = root / f"{UNFINISHED}{uuid.uuid4().hex}"
        copy.mkdir()
        try:
            digest = _copy(source, copy)
            if adapter_digest(copy) != digest:
                raise Unavailable(f"the copy of {source} in {root} came out different: the disk is failing or full")
            verdict = check(copy)
            _put_in_place(copy, root / digest, digest)
            return digest, verdict
        finally:
            shutil.rmtree(copy, ignore_errors=True)
    except OSError as error:
        raise Unavailable(f"adapters can't be kept in {root}: {error.strerror or error}") from error


def _copy(source: Path, copy: Path) -> str:
    """Copies the adapter's files down to the disk and returns the digest of the bytes that were read."""
    digest = hashlib.sha256()
    for name in adapter_files(source):
        size = file_size(source, name)
        add_file_header(digest, name, size)
        with open(copy / name, "wb") as file:
            for chunk in read_chunks(source, name):
                digest.update(chunk)
                file.write(chunk)
            if file.tell() != size:
                raise InvalidAdapter(f"{name} in {source} changed while it was read: add it again when it is complete")
            file.flush()
            os.fsync(file.fileno())
        os.chmod(copy / name, 0o444)
    _sync_folder(copy)
    return digest.hexdigest()


def _put_in_place(copy: Path, target: Path, digest: str) -> None:
    if target.exists():
        if _holds(target, digest):
            return
        target.rename(copy.with_name(f"{UNFINISHED}{uuid.uuid4().hex}"))  # damaged; removed with the leftovers
    try:
        copy.rename(target)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise
        # Another process was quicker, with the same content.
    _sync_folder(target.parent)


def _holds(folder: Path, digest: str) -> bool:
    try:
        return adapter_digest(folder) == digest
    except InvalidAdapter:
        return False


def _remove_leftovers(root: Path) -> None:
    for folder in root.glob(f"{UNFINISHED}*"):
        try:
            if time.time() - folder.stat().st_mtime > UNFINISHED_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)
        except FileNotFoundError:
            continue  # its owner finished


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
