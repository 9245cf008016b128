"""Damaged headers, frames and connections of KV pushes: only the announced bytes become ready, and no byte stays."""

from __future__ import annotations

import asyncio
import itertools
import random
from contextlib import closing, suppress
from dataclasses import replace

import grpc
import grpc.aio
import pytest

from preft.core.errors import TransferFailed
from preft.core.request import KvHeader
from preft.memory.arena import StagingArena
from preft.rpc import kv_transfer_pb2
from preft.rpc.convert import header_to_proto
from preft.rpc.secret import ClusterSecret
from preft.rpc.server_options import WORKER_SERVER_OPTIONS
from preft.rpc.status import status_lost
from preft.transfer.grpc_push import HEADER_KEY, METHOD, GrpcKvSender, status_of
from preft.transfer.grpc_receive import kv_transfer_handler
from preft.transfer.handles import HandleTable
from preft.transfer.port import checksum_of, hash_prompt
from preft.transfer.receive import KvReceiver
from support.fuzzing import Inputs, nothing_left, share, told
from support.mutations import damaged, wire_bytes

pytestmark = pytest.mark.timeout(600)

CAPACITY = 1 << 20
PROMPT = hash_prompt(range(17))
PAYLOAD = random.Random(0).randbytes(5000)
SECRET = ClusterSecret("of both sides")
ALLOWED = {
    *(grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.DATA_LOSS),  # the header or the bytes are refused
    *(grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED),
}
AT_ONCE = 16
OPENING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes.fromhex(
    "00001204000000000000020000000000030000000000040000ffff000004080000000000003fffffff"
)
HEADERS = bytes.fromhex("00000a01040000000183869684") + b"/x\x01\x02\x03"


class Receiver:
    """The receiving half of a decode worker, on a server."""

    def __init__(self) -> None:
        self.arena = StagingArena.create(CAPACITY)
        self.handles = HandleTable(self.arena, fingerprint="fp", lease=30)
        receiver = KvReceiver(self.arena, self.handles, room_timeout=0.5, frame_timeout=0.5)
        self.server = grpc.aio.server(options=WORKER_SERVER_OPTIONS)
        self.server.add_generic_rpc_handlers((kv_transfer_handler(receiver, SECRET),))
        self.port = self.server.add_insecure_port("127.0.0.1:0")

    def held(self) -> int:
        return self.arena.used + self.handles.open_handles

    async def received(self, header: KvHeader) -> bytes:
        """What a Decode call gets for the header's handle."""
        claim = await self.handles.claim(
            header.handle,
            adapter_digest=header.adapter_digest,
            prompt_hash=header.prompt_hash,
            num_tokens=header.num_tokens,
            timeout=1,
        )
        with closing(claim):
            return bytes(self.arena.view(claim.region))


def a_header(handle: str) -> KvHeader:
    return KvHeader(handle, "fp", "d0" * 32, 17, len(PAYLOAD), checksum_of(PAYLOAD), 1, PROMPT)


def frames_of(source: random.Random) -> list[bytes]:
    """The payload in pieces, of which some are lost, repeated, changed, or in another order."""
    cuts = sorted(source.sample(range(1, len(PAYLOAD)), source.choice((0, 1, 4, 30))))
    frames = [PAYLOAD[start:end] for start, end in itertools.pairwise([0, *cuts, len(PAYLOAD)])]
    at = source.randrange(len(frames))
    match source.choice(("whole", "whole", "lost", "twice", "changed", "shuffled", "more", "empty", "large")):
        case "lost":
            del frames[at]
        case "twice":
            frames.insert(at, frames[at])
        case "changed":
            frames[at] = damaged(source, frames[at])
        case "shuffled":
            source.shuffle(frames)
        case "more":
            frames.append(b"!")
        case "empty":
            frames[at:at] = [b""] * 3
        case "large":
            frames.insert(at, bytes(CAPACITY + 1))
    return frames


async def push(channel: grpc.aio.Channel, header: bytes, frames: list[bytes]) -> tuple[grpc.StatusCode, str]:
    stream = channel.stream_stream(METHOD)(metadata=((HEADER_KEY, header),), timeout=5)
    ended = status_of(stream)
    with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
        for frame in frames:
            await stream.write(frame)
        await stream.done_writing()
        await stream.read()
    return await ended


async def one_push(receiver: Receiver, channel: grpc.aio.Channel, source: random.Random) -> bool:
    """Whether the damaged push was taken. What was taken are the bytes that its header announces."""
    handle = f"h{source.getrandbits(60)}"
    message = header_to_proto(a_header(handle))
    content = message.SerializeToString() if source.random() < 0.5 else wire_bytes(source, message)
    frames = frames_of(source)
    with told((content, [len(frame) for frame in frames])):
        code, says = await push(channel, content, frames)
        if code is not grpc.StatusCode.OK:
            assert code in ALLOWED or status_lost(code, says), (code, says)
            receiver.handles.release(handle)
            return False
        sent = kv_transfer_pb2.KvHeader.FromString(content)
        fields = {field.name: getattr(sent, field.name) for field in sent.DESCRIPTOR.fields}
        header = replace(a_header(handle), **fields)
        got = await receiver.received(header)
        assert (len(got), checksum_of(got)) == (header.num_bytes, header.checksum)
        receiver.handles.release(header.handle)
        return True


async def one_connection(receiver: Receiver, source: random.Random) -> None:
    """Bytes that are nearly HTTP/2."""
    content = damaged(source, OPENING + HEADERS * source.choice((0, 1, 5)))
    with suppress(ConnectionError, TimeoutError):
        reader, writer = await asyncio.open_connection("127.0.0.1", receiver.port)
        writer.write(content)
        async with asyncio.timeout(0.2):
            await reader.read(1 << 16)
    writer.close()
    with suppress(ConnectionError):
        await writer.wait_closed()


@share
async def test_kv_transfer(whole: bool) -> None:
    inputs = Inputs("KV transfer", whole)
    receiver = Receiver()
    await receiver.server.start()
    sender = GrpcKvSender(SECRET)
    address = f"127.0.0.1:{receiver.port}"

    async def good() -> None:
        header = a_header(f"good-{random.getrandbits(60)}")
        for _ in range(3):  # others may have taken all the room
            with suppress(TransferFailed):
                await sender.push(address, header, memoryview(PAYLOAD), timeout=5)
                break
            header = replace(header, handle=f"good-{random.getrandbits(60)}")
        assert await receiver.received(header) == PAYLOAD

    try:
        async with grpc.aio.insecure_channel(address) as channel:
            await good()
            await push(channel, header_to_proto(a_header("warm")).SerializeToString(), [PAYLOAD])
            receiver.handles.release("warm")

            async def one(source: random.Random) -> None:
                if source.random() < 0.1:
                    await one_connection(receiver, source)
                elif await one_push(receiver, channel, source):
                    inputs.took()

            async with nothing_left(receiver.held):
                pending = iter(inputs)
                while batch := list(itertools.islice(pending, AT_ONCE)):
                    await asyncio.gather(good(), *map(one, batch))
    finally:
        await sender.close()
        await receiver.server.stop(None)
        receiver.handles.close()
        receiver.arena.close()
