"""A prefill or a decode service with all its parts, on a real gRPC server, over a fake engine.

KV reaches the decode side, or leaves the prefill side, through the loopback transport.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, closing
from pathlib import Path
from typing import Any

import grpc.aio

from preft.adapters.formats.digest import LORA_FILES, adapter_digest
from preft.adapters.store.adapter_store import AdapterStore
from preft.core.cluster import Role
from preft.core.errors import PreftError
from preft.core.request import AdapterRef, KvHeader, Sampling, TokenDelta
from preft.memory.arena import StagingArena
from preft.router.decode_stream import DecodeCall, DecodeStream
from preft.rpc import workers_pb2, workers_pb2_grpc
from preft.rpc.convert import adapter_to_proto, delta_from_proto, sampling_to_proto
from preft.rpc.secret import CALLER_KEY
from preft.rpc.status import CODE_KEY
from preft.transfer.handles import HandleTable
from preft.transfer.port import checksum_of, hash_prompt
from preft.transfer.receive import KvReceiver
from preft.transfer.seal import SEAL, write_seal
from preft.worker.decode.service import DecodeService
from preft.worker.prefill.service import PrefillService
from preft.worker.usage import Usage
from support.adapter_tiers import adapter_store
from support.fake_engine import FakeEngine, kv_of
from support.loopback_sender import LoopbackKvSender

ARENA_BYTES = 8192
FINGERPRINT = "fp"
SLOTS = 4
GREEDY = Sampling(max_tokens=6, temperature=0.0)


def write_adapter(folder: Path, content: str) -> AdapterRef:
    """An adapter folder as the services see it: files with a digest. `folder.name` is the adapter's name."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in LORA_FILES:
        (folder / name).write_text(f"{name} {content}")
    return AdapterRef(folder.name, adapter_digest(folder), str(folder))


SOON = 20.0  # seconds within which awaited events happen, also on a busy machine


async def until(condition: Callable[[], bool], seconds: float = SOON) -> None:
    """Returns once `condition` holds; raises TimeoutError if that takes too long."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.001)


async def deltas_of(call: DecodeCall) -> list[TokenDelta]:
    """All remaining deltas of a choice that must end well."""
    deltas = [delta_from_proto(await call.read())]
    while deltas[-1].finish_reason is None:
        deltas.append(delta_from_proto(await call.read()))
    return deltas


async def rest(call: DecodeCall) -> list[int]:
    """All remaining tokens of a choice that must end well."""
    return [token for delta in await deltas_of(call) for token in delta.token_ids]


async def failed(call: DecodeCall) -> tuple[list[int], PreftError]:
    """The tokens and the error of a choice that must fail soon."""
    tokens: list[int] = []
    try:
        async with asyncio.timeout(SOON):
            while True:
                delta = await call.read()
                tokens += delta.token_ids
                assert not delta.finish_reason, "the choice ended well"
    except PreftError as error:
        return tokens, error


async def broken(call: Any) -> tuple[list[Any], grpc.aio.AioRpcError]:
    """The messages and the error of a call that must fail."""
    messages = []
    try:
        async for message in call:
            messages.append(message)
    except grpc.aio.AioRpcError as error:
        return messages, error
    raise AssertionError("the call ended well")


def code_of(error: grpc.aio.AioRpcError) -> str:
    """The PreftError's own code in a status."""
    return str(dict(error.trailing_metadata() or ()).get(CODE_KEY))


@asynccontextmanager
async def channel_to(add: Callable[[Any, grpc.aio.Server], None], service: Any) -> AsyncIterator[grpc.aio.Channel]:
    """A channel to a server of `service` alone. `add` (generated code) adds the service to the server."""
    server = grpc.aio.server()
    add(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield channel
    finally:
        await server.stop(None)


class KvSink:
    """The receiving half of a decode worker. Senders know it as `address`."""

    address = "decode:1"

    def __init__(self, capacity: int = ARENA_BYTES, fingerprint: str = FINGERPRINT) -> None:
        self.arena = StagingArena.create(capacity)
        self.handles = HandleTable(self.arena, fingerprint=fingerprint, lease=30)
        self.receiver = KvReceiver(self.arena, self.handles, room_timeout=5, frame_timeout=5)
        self.sender = LoopbackKvSender({self.address: self.receiver})

    async def deliver(self, handle: str, digest: str, prompt: Sequence[int], *, uses: int = 1) -> None:
        """Does what a prefill worker's push does."""
        payload = bytearray(kv_of(digest, prompt) + bytes(SEAL.size))
        write_seal(memoryview(payload), len(prompt))
        header = KvHeader(
            handle, FINGERPRINT, digest, len(prompt), len(payload), checksum_of(payload), uses, hash_prompt(prompt)
        )
        await self.sender.push(self.address, header, memoryview(payload), timeout=5)

    async def received(self, handle: str, digest: str, prompt: Sequence[int]) -> bytes:
        """The bytes that a Decode call would get. Takes one use of the handle."""
        claim = await self.handles.claim(
            handle, adapter_digest=digest, prompt_hash=hash_prompt(prompt), num_tokens=len(prompt), timeout=1
        )
        with closing(claim):
            return bytes(self.arena.view(claim.region))


class PrefillRig:
    """A served PrefillService, its engine and arena, and the sink that receives its KV."""

    def __init__(
        self,
        channel: grpc.aio.Channel,
        engine: FakeEngine,
        adapters: AdapterStore,
        arena: StagingArena,
        sink: KvSink,
    ) -> None:
        self.stub = workers_pb2_grpc.PrefillWorkerStub(channel)
        self.engine = engine
        self.adapters = adapters
        self.arena = arena
        self.sink = sink
        self.service: PrefillService

    def call(
        self,
        prompt: Sequence[int],
        sampling: Sampling = GREEDY,
        *,
        adapter: AdapterRef | None = None,
        n: int = 1,
        handle: str = "h",
        to: str | None = KvSink.address,
        resume: bool = False,
        timeout: float | None = 20,
        caller: str | None = None,
        salt: str = "",
    ) -> grpc.aio.UnaryStreamCall:
        request = workers_pb2.PrefillRequest(
            request_id="r",
            prompt_token_ids=prompt,
            sampling=sampling_to_proto(sampling),
            adapter=adapter_to_proto(adapter) if adapter else None,
            n=n,
            target=workers_pb2.KvTarget(address=to, handle=handle) if to else None,
            resume=resume,
            cache_salt=salt,
        )
        return self.stub.Prefill(request, timeout=timeout, metadata=((CALLER_KEY, caller),) if caller else None)

    async def run(self, prompt: Sequence[int], sampling: Sampling = GREEDY, **options: object) -> list[TokenDelta]:
        """The first tokens, by index, once the call has ended well."""
        events = [event async for event in self.call(prompt, sampling, **options)]  # type: ignore[arg-type]
        assert [event.WhichOneof("event") for event in events] in (["first_tokens"], ["first_tokens", "kv_pushed"])
        return [delta_from_proto(choice) for choice in events[0].first_tokens.choices]


class DecodeRig:
    """A served DecodeService, its engine, and the sink that holds its KV."""

    def __init__(self, channel: grpc.aio.Channel, engine: FakeEngine, sink: KvSink) -> None:
        self.stub = workers_pb2_grpc.DecodeWorkerStub(channel)
        self.stream = DecodeStream(self.stub, "decode-0", self._count_lost)
        self.engine = engine
        self.sink = sink
        self.lost = 0
        self.service: DecodeService

    def call(
        self,
        prompt: Sequence[int],
        output: Sequence[int],
        sampling: Sampling = GREEDY,
        *,
        digest: str = "",
        handle: str = "h",
        index: int = 0,
        timeout: float = 20,
        kv_timeout: float = 20,
        salt: str = "",
    ) -> DecodeCall:
        request = workers_pb2.DecodeRequest(
            request_id="r",
            handle=handle,
            prompt_token_ids=prompt,
            sampling=sampling_to_proto(sampling),
            adapter_digest=digest,
            kv_timeout=kv_timeout,
            cache_salt=salt,
            choices=[workers_pb2.DecodeChoice(index=index, output_token_ids=output)],
        )
        [call] = self.stream.start(request, timeout)
        return call

    async def run(
        self, prompt: Sequence[int], output: Sequence[int], sampling: Sampling = GREEDY, **options: object
    ) -> list[int]:
        """All further tokens."""
        return await rest(self.call(prompt, output, sampling, **options))  # type: ignore[arg-type]

    def _count_lost(self) -> None:
        self.lost += 1

    def idle(self) -> bool:
        return not (self.sink.arena.used or self.sink.handles.open_handles or self.service.usage.running)


@asynccontextmanager
async def prefill_rig(
    engine_type: type[FakeEngine] = FakeEngine,
    *,
    host_bytes: int = ARENA_BYTES,
    sink: KvSink | None = None,
    slots: int = SLOTS,
) -> AsyncIterator[PrefillRig]:
    """Checks at the end that no byte and no running request is left."""
    arena, sink = StagingArena.create(ARENA_BYTES), sink or KvSink()
    memory = StagingArena.create(host_bytes)
    engine = engine_type(Role.PREFILL, arena.path, memory.path)
    try:
        async with AsyncExitStack() as opened:
            adapters = await opened.enter_async_context(adapter_store(engine, memory))
            service = PrefillService(engine, adapters, arena, sink.sender, FINGERPRINT, Usage(slots))
            serve = channel_to(workers_pb2_grpc.add_PrefillWorkerServicer_to_server, service)
            channel = await opened.enter_async_context(serve)
            rig = PrefillRig(channel, engine, adapters, arena, sink)
            rig.service = service
            yield rig
            await until(lambda: not (arena.used or service.usage.running or engine.stats.running))
            assert not service.usage.prompted
    finally:
        sink.handles.close()
        arena.close()
        memory.close()
        sink.arena.close()
        await engine.close()


@asynccontextmanager
async def decode_rig() -> AsyncIterator[DecodeRig]:
    """Checks at the end that no byte, no handle and no running request is left."""
    sink = KvSink()
    engine = FakeEngine(Role.DECODE, sink.arena.path)
    service = DecodeService(engine, sink.handles, Usage(0))
    try:
        async with channel_to(workers_pb2_grpc.add_DecodeWorkerServicer_to_server, service) as channel:
            rig = DecodeRig(channel, engine, sink)
            rig.service = service
            yield rig
            await until(lambda: rig.idle() and not engine.stats.running)
            await rig.stream.close()
    finally:
        sink.handles.close()
        sink.arena.close()
        await engine.close()
