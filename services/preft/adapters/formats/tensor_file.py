"""Reads safetensors files without a tensor library: types and shapes from the header, checks of the values.

The gateway checks adapters and never imports torch, and numpy has no bfloat16; hence this module.
Format: https://huggingface.co/docs/safetensors/index#format
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

MAX_HEADER = 100_000_000  # bytes, the format's own limit
CHECKED_AT_ONCE = 1 << 22  # elements
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}
ITEM_BYTES |= {f"{sign}{8 * size}": size for sign in "IU" for size in (1, 2, 4, 8)} | {"BOOL": 1}
NUMPY_TYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}
BF16_EXPONENT = 0x7F80  # all ones: infinity or NaN


Array = np.ndarray[Any, Any]


class BrokenTensorFile(ValueError):
    """Not a whole safetensors file. `str(error)` is the reason, without the file's name."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor: its safetensors element type, its shape, and the offsets of its bytes in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_entries(path: Path) -> dict[str, TensorEntry]:
    """All tensors of the file, by name. Reads the header alone, and checks it against the file's size.

    Raises BrokenTensorFile, or OSError if the file can't be read.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little") if size >= 8 else 0
        if not 2 <= header_bytes <= min(MAX_HEADER, size - 8):
            raise BrokenTensorFile("it is not a safetensors file, or cut short")
        raw = file.read(header_bytes)
    return _entries(raw, size)


def entries_in(memory: memoryview) -> dict[str, TensorEntry]:
    """All tensors of a file in memory. Raises BrokenTensorFile."""
    header_bytes = int.from_bytes(memory[:8], "little")
    return _entries(bytes(memory[8 : 8 + header_bytes]), len(memory))


def _entries(raw: bytes, size: int) -> dict[str, TensorEntry]:
    """The tensors that a header describes, in a file of `size` bytes."""
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise BrokenTensorFile("it is not a safetensors file: its header is not JSON") from error
    if not isinstance(header, dict):
        raise BrokenTensorFile("it is not a safetensors file: its header is not a JSON object")
    header.pop("__metadata__", None)
    data_start = 8 + len(raw)
    entries = {name: _entry(name, value, data_start) for name, value in header.items()}
    expected = data_start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != expected:
            raise BrokenTensorFile(f"tensor {name} does not start where the one before it ends")
        expected = entry.end
    if expected != size:
        raise BrokenTensorFile(f"it has {size} bytes where its header says {expected}: cut short or overwritten")
    return entries


def is_finite(path: Path, entry: TensorEntry) -> bool:
    """Whether no element is infinite or NaN. `entry.dtype` must be F32, F16 or BF16."""
    values = _mapped(path, entry)
    for start in range(0, len(values), CHECKED_AT_ONCE):
        part = values[start : start + CHECKED_AT_ONCE]
        finite = (part & BF16_EXPONENT) != BF16_EXPONENT if entry.dtype == "BF16" else np.isfinite(part)
        if not finite.all():
            return False
    return True


def equal_values(path: Path, entry: TensorEntry, other_path: Path, other: TensorEntry) -> bool:
    """Whether two tensors of one shape are equal, after rounding to the less precise of their types.

    Both must be F32, F16 or BF16.
    """
    ours, theirs = _mapped(path, entry), _mapped(other_path, other)
    for start in range(0, len(ours), CHECKED_AT_ONCE):
        a, b = (tensor[start : start + CHECKED_AT_ONCE] for tensor in (ours, theirs))
        if entry.dtype == other.dtype:
            same = np.array_equal(a, b)
        else:
            wide_a, wide_b = _as_float32(a, entry.dtype), _as_float32(b, other.dtype)
            same = np.array_equal(wide_a, _rounded(wide_b, entry.dtype)) or np.array_equal(
                wide_b, _rounded(wide_a, other.dtype)
            )
        if not same:
            return False
    return True


def _mapped(path: Path, entry: TensorEntry) -> Array:
    count = (entry.end - entry.start) // ITEM_BYTES[entry.dtype]
    if count == 0:
        return np.empty(0, NUMPY_TYPES[entry.dtype])
    return np.memmap(path, dtype=NUMPY_TYPES[entry.dtype], mode="r", offset=entry.start, shape=(count,))


def _as_float32(values: Array, dtype: str) -> Array:
    return (values.astype("<u4") << 16).view("<f4") if dtype == "BF16" else values.astype("<f4")


def _rounded(values: Array, dtype: str) -> Array:
    """Finite float32 `values`, rounded to type `dtype` (to nearest even), as float32."""
    if dtype == "BF16":
        bits = values.view("<u4").astype("<u8")
        rounded: Array = ((bits + 0x7FFF + ((bits >> 16) & 1) >> 16) << 16).astype("<u4").view("<f4")
        return rounded
    with np.errstate(over="ignore"):
        return values.astype(NUMPY_TYPES[dtype]).astype("<f4")


def _entry(name: str, value: Any, data_start: int) -> TensorEntry:
    match value:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(start), int(end)]}:
            if not all(type(length) is int and length >= 0 for length in shape):
                raise BrokenTensorFile(f"tensor {name} has no valid shape")
            item = ITEM_BYTES.get(dtype)
            if start < 0 or end < start or (item is not None and end - start != math.prod(shape) * item):
                raise BrokenTensorFile(f"the size of tensor {name} does not fit its shape")
            return TensorEntry(dtype, tuple(shape), data_start + start, data_start + end)
    raise BrokenTensorFile(f"the header entry of tensor {name} is malformed")
