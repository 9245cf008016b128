"""An adapter's identity: the sha256 of its two files, wherever the folder lies and whatever else is in it."""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Iterator
from pathlib import Path

from preft.core.errors import InvalidAdapter

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
FILES = (CONFIG_FILE, WEIGHTS_FILE)
CHUNK = 1 << 20


def adapter_digest(folder: Path) -> str:
    """sha256 (hex) over name, size and bytes of each file in FILES, in that order. Blocks while it reads.

    Raises InvalidAdapter if a file is missing or can't be read.
    """
    digest = hashlib.sha256()
    for name in FILES:
        add_file_header(digest, name, file_size(folder, name))
        for chunk in read_chunks(folder, name):
            digest.update(chunk)
    return digest.hexdigest()


def add_file_header(digest: hashlib._Hash, name: str, size: int) -> None:
    """What goes before a file's bytes, so that no other split of the same bytes has the same digest."""
    digest.update(f"{name} {size}\n".encode())


def file_size(folder: Path, name: str) -> int:
    """Bytes in a file of the adapter. Raises InvalidAdapter if it isn't there or isn't a regular file."""
    try:
        status = (folder / name).stat()
    except FileNotFoundError as error:
        raise InvalidAdapter(f"{name} is missing in {folder}") from error
    except OSError as error:
        raise InvalidAdapter(f"{name} in {folder} can't be read: {error.strerror}") from error
    if not stat.S_ISREG(status.st_mode):
        raise InvalidAdapter(f"{name} in {folder} is not a regular file")
    return status.st_size


def read_chunks(folder: Path, name: str) -> Iterator[bytes]:
    """The file's bytes, a chunk at a time. Raises InvalidAdapter if it can't be read."""
    try:
        with open(folder / name, "rb") as file:
            while chunk := file.read(CHUNK):
                yield chunk
    except OSError as error:
        raise InvalidAdapter(f"{name} in {folder} can't be read: {error.strerror}") from error
