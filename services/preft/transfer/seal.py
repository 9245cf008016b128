"""The seal at the end of a region's payload, which marks the KV of a number of tokens as complete."""

from __future__ import annotations

import struct

SEAL = struct.Struct("<8sQ")
_MAGIC = b"PREFT-KV"


def write_seal(payload: memoryview, num_tokens: int) -> None:
    """Marks `payload` as complete. Call it after all other writes."""
    SEAL.pack_into(payload, len(payload) - SEAL.size, _MAGIC, num_tokens)


def clear_seal(payload: memoryview) -> None:
    """Marks `payload` as incomplete."""
    SEAL.pack_into(payload, len(payload) - SEAL.size, bytes(len(_MAGIC)), 0)


def read_seal(payload: memoryview) -> int | None:
    """Number of tokens whose KV `payload` holds; None if the payload is incomplete."""
    magic, num_tokens = SEAL.unpack_from(payload, len(payload) - SEAL.size)
    return int(num_tokens) if magic == _MAGIC else None
