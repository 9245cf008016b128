"""The interface of a KV transport: the sending side, and the hashes in the header before the bytes.

`preft.memory.arena` owns memory, `receive` the receiving side, and `handles` the handles.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from typing import Protocol

import xxhash

from preft.core.request import KvHeader


class KvSender(Protocol):
    """The prefill worker's side of a transport."""

    async def push(self, address: str, header: KvHeader, payload: memoryview, *, timeout: float) -> None:
        """Returns when the receiver at `address` has verified and kept all of `payload` (`header.num_bytes` bytes).

        No byte is sent before the receiver has room. Raises TransferFailed with the receiver's reason, or because the
        receiver is unreachable or gone, or `timeout` seconds are over. The call may be cancelled. After the call
        nothing reads `payload`.
        """

    async def close(self) -> None:
        """Closes all connections; running pushes fail."""


def checksum_of(payload: memoryview | bytes) -> int:
    """xxh3-64 of all bytes."""
    return int(xxhash.xxh3_64_intdigest(payload))


def hash_prompt(token_ids: Sequence[int]) -> bytes:
    """sha256 of the token ids as little-endian uint32: 32 bytes."""
    return hashlib.sha256(struct.pack(f"<{len(token_ids)}I", *token_ids)).digest()
