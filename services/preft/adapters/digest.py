"""An adapter's files, and its identity: their sha256, wherever the folder lies and whatever else is in it.

A LoRA is two files as PEFT names them, a ReFT two files of our own (docs/adapters.md); a folder with both is one
adapter.
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
PREFILL_ONLY = "prefill_only"  # field of either configuration: true if it was trained for the prompt pass alone
CHUNK = 1 << 20


def adapter_files(folder: Path) -> tuple[str, ...]:
    """The names of the files that are the adapter: a kind's two files if one of them is there; LoRA's if none is."""
    kinds = [kind for kind in (LORA_FILES, REFT_FILES) if any((folder / name).exists() for name in kind)]
    return tuple(name for kind in kinds or [LORA_FILES] for name in kind)


def adapter_digest(folder: Path) -> str:
    """sha256 (hex) over name, size and bytes of each of the `adapter_files`, in that order. Blocks while it reads.

    Raises InvalidAdapter if a file is missing or can't be read.
    """
    digest = hashlib.sha256()
    for name in adapter_files(folder):
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
