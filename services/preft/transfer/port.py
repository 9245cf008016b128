"""What a KV transport is: the header that goes ahead of the bytes, the sending side, and how a push may be refused.

Owns the vocabulary shared by every transport. Memory is in `staging`, the receiving side in `receive`, handles in
`handles`.
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
    """What a prompt's KV bytes are. Everything is compared before the first of them is used.

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

    MALFORMED = "malformed"  # the header makes no sense
    MISMATCH = "mismatch"  # another fingerprint
    DUPLICATE = "duplicate"  # the handle is or was in use
    NO_ROOM = "no room"  # no staging memory in time
    CORRUPT = "corrupt"  # too few or too many bytes, or another checksum
    ABORTED = "aborted"  # nobody wants the KV any more, or its bytes stopped coming


class PushRefused(TransferFailed):
    """The receiver said no; `str(error)` is its sentence."""

    def __init__(self, message: str, refusal: Refusal) -> None:
        super().__init__(message)
        self.refusal = refusal


class KvSender(Protocol):
    """The prefill worker's side of a transport."""

    async def push(self, address: str, header: KvHeader, payload: memoryview, *, timeout: float) -> None:
        """Returns when the receiver at `address` has verified and kept all of `payload` (`header.num_bytes` bytes).

        Sends none of it before there is room over there.

        Raises PushRefused if it said why it won't, TransferFailed for anything else (unreachable, gone, `timeout`
        seconds over). May be cancelled; either way nothing reads `payload` after the call.
        """

    async def close(self) -> None:
        """Ends all connections; running pushes fail."""


def checksum_of(payload: memoryview | bytes) -> int:
    """xxh3-64 over all bytes."""
    return int(xxhash.xxh3_64_intdigest(payload))


def hash_prompt(token_ids: Sequence[int]) -> bytes:
    """sha256 over the token ids as little-endian uint32: 32 bytes."""
    return hashlib.sha256(struct.pack(f"<{len(token_ids)}I", *token_ids)).digest()
