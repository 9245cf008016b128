import asyncio
from collections.abc import AsyncIterator

import pytest

from preft.core.errors import TransferFailed
from preft.core.request import KvHeader
from preft.memory.arena import StagingArena
from preft.transfer.handles import HandleTable
from preft.transfer.port import checksum_of, hash_prompt
from preft.transfer.receive import KvReceiver


async def test_a_handle_given_up_between_two_frames_is_not_kept_alive_by_the_second() -> None:
    arena = StagingArena.create(1 << 16)
    handles = HandleTable(arena, fingerprint="fp", lease=60)
    receiver = KvReceiver(arena, handles, room_timeout=60, frame_timeout=60)

    async def frames() -> AsyncIterator[bytes]:
        yield b"ab"
        handles.release("h")
        yield b"cd"
        await asyncio.Event().wait()

    header = KvHeader("h", "fp", "", 1, 6, checksum_of(b"abcdef"), 1, hash_prompt([7]))
    with pytest.raises(TransferFailed, match="KV handle h was released"):
        await asyncio.wait_for(receiver.receive(header, frames()), 5)
    assert (arena.used, handles.open_handles) == (0, 0)
    arena.close()
