"""Receives one push over any transport: reserves room, takes the bytes, verifies them, and makes the handle ready.

`preft.memory.arena` owns the memory, `handles` the handles, and a transport the frames.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable

import xxhash

from preft.core.errors import PreftError, TransferFailed
from preft.core.request import KvHeader
from preft.memory.arena import Region, StagingArena
from preft.memory.errors import NoRoom, TooLarge
from preft.transfer.handles import HandleTable


class KvReceiver:
    """The decode worker's side of every transport."""

    def __init__(self, arena: StagingArena, handles: HandleTable, *, room_timeout: float, frame_timeout: float) -> None:
        """Limits in seconds: `room_timeout` on the wait for staging memory, `frame_timeout` on that for each frame."""
        self._arena = arena
        self._handles = handles
        self._room_timeout = room_timeout
        self._frame_timeout = frame_timeout

    async def receive(self, header: KvHeader, frames: AsyncIterable[bytes | memoryview]) -> None:
        """Returns when the handle is ready: all bytes are in staging memory and match the header.

        No frame is requested before there is room for all. Raises TransferFailed, and the errors of `frames`. After an
        error, or a cancellation because the sender is gone, the handle has failed and its memory is free.
        """
        loop = asyncio.get_running_loop()
        limit = asyncio.timeout(None)  # expires at once when the handle is given up
        given_up = ""

        def abort(end: str) -> None:
            nonlocal given_up
            given_up = end
            if not limit.expired():
                limit.reschedule(loop.time())

        self._handles.open(header, abort)
        region: Region | None = None
        reason = "the sender went away"
        try:
            async with limit:
                region = await self._room(header.num_bytes)
                digest = xxhash.xxh3_64()
                position = 0
                view = self._arena.view(region)
                limit.reschedule(loop.time() + self._frame_timeout)
                async for frame in frames:
                    after = position + len(frame)
                    if after > header.num_bytes:
                        raise TransferFailed(f"more than the announced {header.num_bytes} bytes of KV came")
                    view[position:after] = frame
                    digest.update(view[position:after])  # the checksum covers the bytes in memory, not the frame
                    position = after
                    if not given_up:
                        limit.reschedule(loop.time() + self._frame_timeout)
            if position < header.num_bytes:
                raise TransferFailed(f"only {position} of {header.num_bytes} bytes of KV came")
            if digest.intdigest() != header.checksum:
                raise TransferFailed("the KV bytes don't have the announced checksum")
            self._handles.ready(header.handle, region)
            region = None
        except TimeoutError:
            reason = f"no bytes came for {self._frame_timeout:g} s"
            end = given_up or f"failed to arrive: {reason}"
            raise TransferFailed(f"KV handle {header.handle} {end}") from None
        except PreftError as error:
            reason = str(error)
            raise
        finally:
            if region is not None:
                self._arena.release(region)
            self._handles.fail(header.handle, reason)

    async def _room(self, size: int) -> Region:
        try:
            return await self._arena.reserve(size, timeout=self._room_timeout)
        except (TooLarge, NoRoom) as error:
            raise TransferFailed(str(error)) from error
