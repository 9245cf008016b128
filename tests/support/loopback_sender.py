"""A KV transport within one process: passes the bytes to the receiver without a network."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from preft.core.errors import TransferFailed
from preft.core.request import KvHeader
from preft.transfer.receive import KvReceiver

FRAME_BYTES = 1 << 20


class LoopbackKvSender:
    """A KvSender whose addresses are the keys of `receivers`, which may change at any time."""

    def __init__(self, receivers: dict[str, KvReceiver]) -> None:
        self._receivers = receivers

    async def push(self, address: str, header: KvHeader, payload: memoryview, *, timeout: float) -> None:
        """See KvSender."""
        receiver = self._receivers.get(address)
        if receiver is None:
            raise TransferFailed(f"nobody receives KV at {address}")
        try:
            async with asyncio.timeout(timeout):
                await receiver.receive(header, self.frames(payload))
        except TimeoutError:
            raise TransferFailed(f"the KV push to {address} took longer than {timeout:g} s") from None

    async def frames(self, payload: memoryview) -> AsyncIterator[memoryview]:
        """The payload in pieces. Other tasks can run after each piece."""
        for start in range(0, len(payload), FRAME_BYTES):
            yield payload[start : start + FRAME_BYTES]
            await asyncio.sleep(0)

    async def close(self) -> None:
        """Does nothing. See `KvSender.close`."""
