"""Every KV transport delivers exactly the bytes that were sent, or fails on both ends and leaves nothing behind."""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

import grpc.aio
import pytest

from preft.core.errors import TransferFailed
from preft.core.request import KvHeader
from preft.memory.arena import StagingArena
from preft.rpc.secret import ClusterSecret
from preft.rpc.server_options import WORKER_SERVER_OPTIONS
from preft.transfer.grpc_push import FRAME_BYTES, HEADER_KEY, METHOD, GrpcKvSender
from preft.transfer.grpc_receive import kv_transfer_handler
from preft.transfer.handles import HandleTable
from preft.transfer.port import KvSender, checksum_of, hash_prompt
from preft.transfer.receive import KvReceiver
from support.loopback_sender import LoopbackKvSender

CAPACITY = 8 << 20
DIGEST = "d0" * 32
SECRET = ClusterSecret("of both sides")
PROMPT = hash_prompt(range(17))
FRAME_TIMEOUT = 0.3
GONE = "the sender went away|only .* came"  # in gRPC, a sender that is gone looks like one that has finished
BIG = random.Random(0).randbytes(3 * FRAME_BYTES + 77)

Tamper = Callable[[AsyncIterator[bytes]], AsyncIterator[bytes]]


class TamperingLoopback(LoopbackKvSender):
    """Loses, changes or delays frames on the way."""

    tamper: Tamper

    def frames(self, payload: memoryview) -> AsyncIterator[bytes]:
        return self.tamper(super().frames(payload))


class TamperingGrpc(GrpcKvSender):
    """Loses, changes or delays frames on the way."""

    tamper: Tamper

    def frames(self, payload: memoryview) -> AsyncIterator[bytes]:
        return self.tamper(super().frames(payload))


class Cable:
    """A TCP connection's way through a proxy that can be cut or held up."""

    def __init__(self) -> None:
        self.passing = asyncio.Event()
        self.passing.set()
        self.seen = 0  # bytes towards the receiver
        self._writers: list[asyncio.StreamWriter] = []
        self._tasks: list[asyncio.Task[None]] = []

    async def lay(self, port: int) -> str:
        self._target = port
        self._server = await asyncio.start_server(self._connect, "127.0.0.1", 0)
        return f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target)
        self._writers += [writer, far_writer]
        self._tasks += [
            asyncio.create_task(self._carry(reader, far_writer, count=True)),
            asyncio.create_task(self._carry(far_reader, writer)),
        ]

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, count: bool = False) -> None:
        try:
            while data := await reader.read(1 << 16):
                await self.passing.wait()
                writer.write(data)
                await writer.drain()
                self.seen += len(data) * count
        except ConnectionError:
            pass
        finally:
            writer.close()

    def cut(self) -> None:
        for writer in self._writers:
            writer.transport.abort()
        self._server.close()

    async def close(self) -> None:
        self.cut()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


class Wire:
    """A receiver with all its parts, and senders that reach it at `address`."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.arena = StagingArena.create(CAPACITY)
        self.handles = HandleTable(self.arena, fingerprint="fp", lease=30)
        self.receiver = KvReceiver(self.arena, self.handles, room_timeout=1, frame_timeout=FRAME_TIMEOUT)
        self.address = "decode"
        self._senders: list[KvSender] = []

    async def __aenter__(self) -> "Wire":
        if self.kind == "grpc":
            self._server = grpc.aio.server(options=WORKER_SERVER_OPTIONS)
            self._server.add_generic_rpc_handlers((kv_transfer_handler(self.receiver, SECRET),))
            self.port = self._server.add_insecure_port("127.0.0.1:0")
            self.address = f"127.0.0.1:{self.port}"
            await self._server.start()
        return self

    def sender(self, tamper: Tamper | None = None) -> KvSender:
        sender: TamperingLoopback | TamperingGrpc
        sender = TamperingGrpc(SECRET) if self.kind == "grpc" else TamperingLoopback({self.address: self.receiver})
        sender.tamper = tamper or (lambda frames: frames)
        self._senders.append(sender)
        return sender

    async def push(self, payload: bytes, tamper: Tamper | None = None, timeout: float = 10, **header: object) -> None:
        await self.sender(tamper).push(
            self.address, make_header(payload, **header), memoryview(payload), timeout=timeout
        )

    async def received(self, name: str = "h", adapter_digest: str = DIGEST) -> bytes:
        """What a Decode call gets. Uses the handle up."""
        claim = await self.handles.claim(
            name, adapter_digest=adapter_digest, prompt_hash=PROMPT, num_tokens=17, timeout=5
        )
        with contextlib.closing(claim):
            return bytes(self.arena.view(claim.region))

    async def until_arriving(self) -> None:
        async with asyncio.timeout(5):
            while not self.arena.regions:
                await asyncio.sleep(0.001)

    async def until_empty(self) -> None:
        async with asyncio.timeout(5):
            while self.arena.used or self.handles.open_handles:
                await asyncio.sleep(0.001)

    async def stop(self) -> None:
        if self.kind == "grpc":
            await self._server.stop(None)

    async def __aexit__(self, *error: object) -> None:
        for sender in self._senders:
            await sender.close()
        await self.stop()
        self.arena.close()


def make_header(payload: bytes, **changes: object) -> KvHeader:
    header = KvHeader("h", "fp", DIGEST, 17, len(payload), checksum_of(payload), 1, PROMPT)
    return replace(header, **changes)  # type: ignore[arg-type]


@pytest.fixture(params=["loopback", "grpc"])
async def wire(request: pytest.FixtureRequest) -> AsyncIterator[Wire]:
    """A receiver that must have nothing left after the test: no handle, no byte."""
    async with Wire(request.param) as wire:
        yield wire
        await wire.until_empty()


@pytest.fixture
async def grpc_wire() -> AsyncIterator[tuple[Wire, Cable]]:
    """A gRPC receiver behind a cable."""
    cable = Cable()
    async with Wire("grpc") as wire:
        wire.address = await cable.lay(wire.port)
        try:
            yield wire, cable
            await wire.until_empty()
        finally:
            await cable.close()


async def stuck_after_one(frames: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The sender is alive, but sends no more than one frame."""
    async for frame in frames:
        yield frame
        await asyncio.Event().wait()


async def slow(frames: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Takes longer than FRAME_TIMEOUT for all frames, but not for one."""
    async for frame in frames:
        yield frame
        await asyncio.sleep(FRAME_TIMEOUT / 3)


async def corrupt(frames: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """One bit of the second frame flips."""
    number = 0
    async for frame in frames:
        number += 1
        yield bytes([frame[0] ^ 1]) + bytes(frame[1:]) if number == 2 else frame


async def truncated(frames: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The last byte of each frame is lost."""
    async for frame in frames:
        yield frame[:-1]


async def too_much(frames: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """One byte more than announced."""
    async for frame in frames:
        yield frame
    yield b"!"


async def swapped(frames: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The first two frames change places."""
    first, second, *others = [frame async for frame in frames]
    for frame in (second, first, *others):
        yield frame


async def small_and_empty(frames: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The same bytes in pieces of other sizes."""
    payload = b"".join([bytes(frame) async for frame in frames])
    position = 0
    for size in (0, 1, 2, 1000, 0, 2 * FRAME_BYTES, len(payload)):
        yield payload[position : position + size]
        position += size


async def test_kv_goes_past_http_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    async with Wire("grpc") as wire:
        await wire.push(b"bytes" * 100)
        assert await wire.received() == b"bytes" * 100


@pytest.mark.parametrize("size", [1, 63, 64, 4097, FRAME_BYTES, FRAME_BYTES + 1, len(BIG)])
async def test_exact_bytes(wire: Wire, size: int) -> None:
    await wire.push(BIG[:size])
    assert wire.arena.regions == 1
    assert await wire.received() == BIG[:size]


async def test_frames_of_any_size(wire: Wire) -> None:
    await wire.push(BIG, small_and_empty)
    assert await wire.received() == BIG


async def test_many_at_once_through_little_room(wire: Wire) -> None:
    """20 MiB through 8 MiB: each push waits for its room, none is mixed up with another."""
    sender = wire.sender()

    async def one(number: int) -> None:
        payload = BIG[number:] + bytes(number)
        header = make_header(payload, handle=f"h{number}", adapter_digest=f"{number:064x}")
        await sender.push(wire.address, header, memoryview(payload), timeout=10)
        assert await wire.received(f"h{number}", f"{number:064x}") == payload

    await asyncio.gather(*(one(number) for number in range(7)))


@pytest.mark.parametrize(
    ("tamper", "says"),
    [
        (corrupt, "don't have the announced checksum"),
        (swapped, "don't have the announced checksum"),
        (truncated, f"only {len(BIG) - 4} of {len(BIG)} bytes of KV came"),
        (too_much, f"more than the announced {len(BIG)} bytes of KV came"),
    ],
)
async def test_bytes_that_are_not_what_was_sent_never_become_ready(wire: Wire, tamper: Tamper, says: str) -> None:
    with pytest.raises(TransferFailed, match=says):
        await wire.push(BIG, tamper)
    with pytest.raises(TransferFailed, match=f"KV handle h failed to arrive: .*{says}"):
        await wire.received()


@pytest.mark.parametrize(
    ("header", "says"),
    [
        ({"fingerprint": "other"}, "KV layouts differ: 'other' was sent, 'fp' is served here"),
        ({"uses": 0}, "malformed"),
        ({"prompt_hash": b""}, "malformed"),
        ({"num_bytes": CAPACITY + 1}, f"don't fit into an arena of {CAPACITY} bytes"),
    ],
)
async def test_refuses_before_any_byte(wire: Wire, header: dict[str, object], says: str) -> None:
    with pytest.raises(TransferFailed, match=says):
        await wire.push(BIG, **header)
    assert wire.arena.used == 0


async def test_a_handle_is_taken_once(wire: Wire) -> None:
    await wire.push(b"first")
    for _ in range(2):
        with pytest.raises(TransferFailed, match="KV handle h is"):
            await wire.push(BIG)
        if wire.handles.open_handles:
            assert await wire.received() == b"first"


async def test_waits_for_room(wire: Wire) -> None:
    full = await wire.arena.reserve(CAPACITY - 64, timeout=1)
    push = asyncio.create_task(wire.push(BIG))
    await asyncio.sleep(0.1)
    claim = asyncio.create_task(wire.received())
    await asyncio.sleep(0.1)
    assert not push.done()
    assert not claim.done()
    wire.arena.release(full)
    await push
    assert await claim == BIG


async def test_no_room_in_time(wire: Wire) -> None:
    full = await wire.arena.reserve(CAPACITY - 64, timeout=1)
    with pytest.raises(TransferFailed, match=r"no room for .* within 1 s"):
        await wire.push(BIG)
    wire.arena.release(full)


async def test_release_while_waiting_for_room_ends_the_push(wire: Wire) -> None:
    full = await wire.arena.reserve(CAPACITY - 64, timeout=1)
    push = asyncio.create_task(wire.push(BIG))
    async with asyncio.timeout(5):
        while not wire.handles.open_handles:
            await asyncio.sleep(0.001)
    wire.handles.release("h")
    with pytest.raises(TransferFailed, match="KV handle h was released"):
        await push
    wire.arena.release(full)


async def test_release_aborts_an_arriving_push(wire: Wire) -> None:
    push = asyncio.create_task(wire.push(BIG, stuck_after_one))
    await wire.until_arriving()
    wire.handles.release("h")
    with pytest.raises(TransferFailed, match="KV handle h was released"):
        await push


async def test_released_at_any_moment(wire: Wire) -> None:
    """The push ends at once, well or with the reason, never by its time limit."""
    ends = set()
    for step in range(200):
        handle = f"h{step}"
        push = asyncio.create_task(wire.push(BIG, handle=handle))
        for _ in range(step):
            await asyncio.sleep(0)
        wire.handles.release(handle)
        (end,) = await asyncio.wait_for(asyncio.gather(push, return_exceptions=True), 2)
        assert end is None or f"KV handle {handle} was released" in str(end)
        ends.add(type(end))
        wire.handles.release(handle)
    assert TransferFailed in ends


async def test_a_slow_sender_is_given_time(wire: Wire) -> None:
    await wire.push(BIG, slow)
    assert await wire.received() == BIG


async def test_a_sender_that_falls_silent(wire: Wire) -> None:
    with pytest.raises(TransferFailed, match=r"no bytes came for 0.3 s"):
        await wire.push(BIG, stuck_after_one)
    with pytest.raises(TransferFailed, match="failed to arrive: no bytes came"):
        await wire.received()


async def test_cancelled_in_the_middle(wire: Wire) -> None:
    push = asyncio.create_task(wire.push(BIG, stuck_after_one))
    await wire.until_arriving()
    claim = asyncio.create_task(wire.received())
    push.cancel()
    with pytest.raises(asyncio.CancelledError):
        await push
    with pytest.raises(TransferFailed, match=f"failed to arrive: {GONE}"):
        await asyncio.wait_for(claim, 5)


async def test_cancelled_at_any_moment(wire: Wire) -> None:
    for step in range(40):
        push = asyncio.create_task(wire.push(BIG, handle=f"h{step}"))
        await asyncio.sleep(step * 2e-4)
        push.cancel()
        await asyncio.gather(push, return_exceptions=True)
        wire.handles.release(f"h{step}")


async def test_gives_up_in_time(wire: Wire) -> None:
    with pytest.raises(TransferFailed, match=wire.address):
        await wire.push(BIG, stuck_after_one, timeout=0.1)


async def test_nobody_there(wire: Wire) -> None:
    with pytest.raises(TransferFailed, match=r"127.0.0.1:9"):
        await wire.sender().push("127.0.0.1:9", make_header(b"x"), memoryview(b"x"), timeout=5)


async def test_the_receiver_ends_in_the_middle(wire: Wire) -> None:
    push = asyncio.create_task(wire.push(BIG, stuck_after_one))
    await wire.until_arriving()
    wire.handles.close()
    with pytest.raises(TransferFailed, match="ended with its worker"):
        await push


async def test_grpc_server_stops_in_the_middle(grpc_wire: tuple[Wire, Cable]) -> None:
    wire, _ = grpc_wire
    push = asyncio.create_task(wire.push(BIG, stuck_after_one))
    await wire.until_arriving()
    await wire.stop()
    with pytest.raises(TransferFailed, match=r"the KV push to 127.0.0.1:.* failed"):
        await push


async def test_grpc_sender_is_closed_in_the_middle(grpc_wire: tuple[Wire, Cable]) -> None:
    wire, _ = grpc_wire
    sender = wire.sender(stuck_after_one)
    push = asyncio.create_task(sender.push(wire.address, make_header(BIG), memoryview(BIG), timeout=10))
    await wire.until_arriving()
    await sender.close()
    with pytest.raises(TransferFailed, match=r"the KV push to .* failed"):
        await push


async def test_grpc_connection_breaks_in_the_middle(grpc_wire: tuple[Wire, Cable]) -> None:
    """As if the other machine had died: each side sees the other vanish."""
    wire, cable = grpc_wire
    push = asyncio.create_task(wire.push(BIG, stuck_after_one))
    await wire.until_arriving()
    claim = asyncio.create_task(wire.received())
    cable.cut()
    with pytest.raises(TransferFailed, match=r"the KV push to 127.0.0.1:.* failed"):
        await asyncio.wait_for(push, 5)
    with pytest.raises(TransferFailed, match=f"failed to arrive: {GONE}"):
        await asyncio.wait_for(claim, 5)


async def test_grpc_network_falls_silent(grpc_wire: tuple[Wire, Cable]) -> None:
    wire, cable = grpc_wire
    push = asyncio.create_task(wire.push(BIG, timeout=1))
    async with asyncio.timeout(5):
        while cable.seen < FRAME_BYTES:
            await asyncio.sleep(0)
    cable.passing.clear()
    with pytest.raises(TransferFailed, match="failed to arrive: no bytes came"):
        await wire.received()
    assert wire.arena.used == 0
    with pytest.raises(TransferFailed, match=r"the KV push to 127.0.0.1:.* failed"):
        await push


async def test_grpc_sender_reads_nothing_while_the_receiver_has_no_room(grpc_wire: tuple[Wire, Cable]) -> None:
    """Back-pressure reaches the sender: the bytes wait there, not in gRPC's buffers."""
    wire, cable = grpc_wire
    full = await wire.arena.reserve(CAPACITY - 64, timeout=1)
    payload = BIG * 2
    push = asyncio.create_task(wire.push(payload))
    await asyncio.sleep(0.5)
    assert cable.seen < 10_000
    wire.arena.release(full)
    await push
    assert await wire.received() == payload


@pytest.mark.parametrize("metadata", [(), ((HEADER_KEY, b"\xff\xff\xff"),), ((HEADER_KEY, b""),)])
async def test_grpc_header_missing_or_unreadable(
    grpc_wire: tuple[Wire, Cable], metadata: tuple[tuple[str, bytes], ...]
) -> None:
    async with grpc.aio.insecure_channel(grpc_wire[0].address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await channel.stream_unary(METHOD)(iter([]), metadata=metadata)
        assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
