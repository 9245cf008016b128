"""The interface of a KV transport: the header before the bytes, the sending side, and the reasons for a refusal.

The module owns the vocabulary that all transports share. `preft.memory.arena` owns memory, `receive` the receiving
side, and `handles` the handles.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

import xxhash

from preft.core.errors import TransferFailed


@dataclass(frozen=True, slots=True)
class KvHeader:
    """Identifies a prompt's KV bytes. The receiver checks all fields before a byte is used.

    `handle` is unique per attempt; `fingerprint` names model, dtype, KV layout, block size and attention backend;
    `adapter_digest` is "" for the base model; `checksum` is `checksum_of` all `num_bytes` bytes; `uses` Decode calls
    may claim the handle; `prompt_hash` is `hash_prompt` of the `num_tokens` prompt tokens.
    """

    handle: str
    fingerprint: str
    adapter_digest: str
    num_tokens: int
    num_bytes: int
    checksum: int
    uses: int
    prompt_hash: bytes


class Refusal(StrEnum):
    """Why a receiver didn't take a push."""

    MALFORMED = "malformed"  # the header is invalid
    MISMATCH = "mismatch"  # another fingerprint
    DUPLICATE = "duplicate"  # the handle is or was in use
    NO_ROOM = "no room"  # no staging memory in time
    CORRUPT = "corrupt"  # too few or too many bytes, or another checksum
    ABORTED = "aborted"  # the handle was given up, or its bytes stopped coming


class PushRefused(TransferFailed):
    """The receiver refused the push; `str(error)` is the receiver's sentence."""

    def __init__(self, message: str, refusal: Refusal) -> None:
        super().__init__(message)
        self.refusal = refusal


class KvSender(Protocol):
    """The prefill worker's side of a transport."""

    async def push(self, address: str, header: KvHeader, payload: memoryview, *, timeout: float) -> None:
        """Returns when the receiver at `address` has verified and kept all of `payload` (`header.num_bytes` bytes).

        No byte is sent before the receiver has room. Raises PushRefused with the receiver's reason, and TransferFailed
        for all other failures (unreachable, gone, `timeout` seconds over). The call may be cancelled. After the call
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
