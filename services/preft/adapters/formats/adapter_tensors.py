"""Checks of the tensors in an adapter's file, for LoRA and ReFT: present, of a served type, and finite.

`peft_format` and `reft_format` check names and shapes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from preft.adapters.formats.tensor_file import BrokenTensorFile, TensorEntry, is_finite, read_entries
from preft.core.errors import InvalidAdapter

DTYPES = ("F32", "F16", "BF16")


def read_tensors(path: Path) -> dict[str, TensorEntry]:
    """All tensors of the file by name, at least one. Raises InvalidAdapter, naming the file."""
    try:
        entries = read_entries(path)
    except BrokenTensorFile as error:
        raise InvalidAdapter(f"{path.name}: {error}") from error
    except OSError as error:
        raise InvalidAdapter(f"{path.name} can't be read: {error.strerror}") from error
    if not entries:
        raise InvalidAdapter(f"{path.name} holds no tensors")
    for name, entry in entries.items():
        if entry.dtype not in DTYPES:
            raise InvalidAdapter(f"{path.name}: tensor {name} is {entry.dtype}, only {', '.join(DTYPES)} are supported")
    return entries


def check_finite(path: Path, entries: Mapping[str, TensorEntry]) -> None:
    """Reads all values. Raises InvalidAdapter for the first tensor with an infinite value or NaN."""
    for name, entry in entries.items():
        if not is_finite(path, entry):
            raise InvalidAdapter(f"{path.name}: tensor {name} holds an infinite value or NaN")
