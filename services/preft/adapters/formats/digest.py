"""The files of an adapter, and their sha256, which is the adapter's identity.

A LoRA is the two files that PEFT writes. A ReFT is two files of PreFT's format (docs/adapters.md). A folder with both
is one adapter. The folder's path and its other files don't enter the digest. Other modules check the content.
"""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Iterator
from pathlib import Path

from preft.core.errors import InvalidAdapter

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
REFT_CONFIG_FILE = "reft_config.json"
REFT_WEIGHTS_FILE = "reft_model.safetensors"
LORA_FILES = (CONFIG_FILE, WEIGHTS_FILE)
REFT_FILES = (REFT_CONFIG_FILE, REFT_WEIGHTS_FILE)
ADAPTER_FILES = (*LORA_FILES, *REFT_FILES)
PREFILL_ONLY = "prefill_only"  # field of either configuration: true if the adapter was trained for the prompt alone
CHUNK = 1 << 20  # bytes that are read at a time


def adapter_files(folder: Path) -> tuple[str, ...]:
    """The names of the adapter's files: both files of each kind that has a file in the folder, else LoRA's."""
    kinds = [kind for kind in (LORA_FILES, REFT_FILES) if any((folder / name).exists() for name in kind)]
    return tuple(name for kind in kinds or [LORA_FILES] for name in kind)


def adapter_digest(folder: Path) -> str:
    """sha256 (hex) over name, size and bytes of each of the `adapter_files`, in that order. Blocks.

    Raises InvalidAdapter if a file is missing or can't be read.
    """
    digest = hashlib.sha256()
    for name in adapter_files(folder):
        add_file_header(digest, name, file_size(folder, name))
        for chunk in read_chunks(folder, name):
            digest.update(chunk)
    return digest.hexdigest()


def add_file_header(digest: hashlib._Hash, name: str, size: int) -> None:
    """Adds a header before a file's bytes, so that another split of the same bytes has another digest."""
    digest.update(f"{name} {size}\n".encode())


def file_size(folder: Path, name: str) -> int:
    """Bytes in a file of the adapter. Raises InvalidAdapter if the file is missing or isn't a regular file."""
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
    """The file's bytes in chunks. Raises InvalidAdapter if the file can't be read."""
    try:
        with open(folder / name, "rb") as file:
            while chunk := file.read(CHUNK):
                yield chunk
    except OSError as error:
        raise InvalidAdapter(f"{name} in {folder} can't be read: {error.strerror}") from error
