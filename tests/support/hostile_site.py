"""Whole workers of all roles over fake engines, and hostile calls of each of their rpcs."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path

import grpc
import grpc.aio
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc

from preft.adapters.formats.digest import LORA_FILES
from preft.core.cluster import Role
from preft.core.request import Sampling
from preft.router.decode_stream import DecodeStream
from preft.rpc import adapter_content_pb2, common_pb2, kv_transfer_pb2, workers_pb2, workers_pb2_grpc
from preft.rpc.convert import sampling_to_proto
from preft.rpc.secret import ClusterChannel
from preft.transfer.grpc_push import HEADER_KEY, METHOD, status_of
from preft.worker.server import WorkerServer
from support.fake_engine import tokens_of
from support.fakes import FakeStore
from support.mutations import varint
from support.worker_servers import SECRET, StartFake, settings_for, start
from support.worker_services import rest, write_adapter

PROMPT = (5, 6, 7, 8, 9)
DIGEST = "d0" * 32
LEASE = 3.0  # seconds for which KV that nobody fetches stays
SECONDS = 1.0  # for a call: what is left of it then has nothing to say
DONE = {grpc.StatusCode.OK, grpc.StatusCode.CANCELLED, grpc.StatusCode.DEADLINE_EXCEEDED}
REFUSALS = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,  # content that the worker doesn't have
    grpc.StatusCode.UNAVAILABLE,  # an adapter whose source isn't there
    grpc.StatusCode.DATA_LOSS,  # KV that never came, goes nowhere, or was refused
}


@asynccontextmanager
async def workers(folder: Path) -> AsyncIterator[dict[Role, WorkerServer]]:
    async with AsyncExitStack() as stack:
        started = {}
        for role in Role:
            settings = settings_for(folder, colocated=role is Role.COLOCATED, router={"transfer_timeout": LEASE})
            started[role] = await start(role, settings, FakeStore(), StartFake())
            stack.push_async_callback(started[role].close)
        yield started


class Site:
    """The workers of all roles in a loop of their own, and what is around them."""

    def __init__(self, folder: Path) -> None:
        self.loop = asyncio.new_event_loop()
        self.outside = folder / "outside"
        self.alice = write_adapter(self.outside / "alice", "alice's")
        (self.outside / "precious").write_text("not an adapter's")
        self._leave = AsyncExitStack()
        self.workers = self.loop.run_until_complete(self._leave.enter_async_context(workers(folder / "site")))
        self.before = self.seen()

    def seen(self) -> dict[str, tuple[str, int]]:
        """Everything outside the workers' own folder: content and time of change."""
        return {
            str(path): (path.read_text() if path.is_file() else "", path.stat().st_mtime_ns)
            for path in (self.outside, *self.outside.rglob("*"))
        }

    def hostile_text(self) -> list[str]:
        """Texts that are paths, addresses or names elsewhere."""
        elsewhere = [str(self.outside), f"../../../../{self.outside}", "..", ".", "/", "/etc/passwd", "~root"]
        targets = ["unix:/tmp/socket", "127.0.0.1:1", "[::1]:99999", "localhost:http", "dns:///localhost:1"]
        return [*elsewhere, *targets, "", "a" * 64, DIGEST, DIGEST.upper(), f"{DIGEST}\n", "a" * 5000, "\n", "é" * 64]

    def close(self) -> None:
        self.loop.run_until_complete(self._leave.aclose())
        self.loop.close()


def a_prefill(site: Site) -> workers_pb2.PrefillRequest:
    """What makes sense, so that one wrong field is what decides."""
    return workers_pb2.PrefillRequest(
        request_id="r",
        prompt_token_ids=PROMPT,
        sampling=sampling_to_proto(Sampling(max_tokens=4, temperature=0.0)),
        adapter=common_pb2.AdapterRef(name="alice", digest=site.alice.digest, source=site.alice.source),
        n=1,
        target=workers_pb2.KvTarget(address=site.workers[Role.DECODE].record.address, handle="h"),
    )


def a_decode(site: Site) -> workers_pb2.DecodeRequest:
    prefill = a_prefill(site)
    return workers_pb2.DecodeRequest(
        request_id="r",
        handle="h",
        prompt_token_ids=PROMPT,
        sampling=prefill.sampling,
        adapter_digest=site.alice.digest,
        kv_timeout=0.01,
        adapter=prefill.adapter,
        choices=[workers_pb2.DecodeChoice(id=1, output_token_ids=[1])],
    )


def a_header(site: Site) -> kv_transfer_pb2.KvHeader:
    return kv_transfer_pb2.KvHeader(
        handle="h",
        fingerprint=site.workers[Role.DECODE].record.fingerprint,
        num_tokens=5,
        num_bytes=100,
        checksum=1,
        uses=1,
        prompt_hash=bytes(32),
    )


RPCS = (
    (Role.PREFILL, "PrefillWorker/Prefill"),
    (Role.PREFILL, "WorkerAdapters/Prefetch"),
    (Role.PREFILL, "AdapterContent/Find"),
    (Role.PREFILL, "AdapterContent/Read"),
    (Role.PREFILL, "WorkerStatus/Watch"),
    (Role.DECODE, "DecodeWorker/Decode"),
    (Role.DECODE, "DecodeWorker/Release"),
    (Role.DECODE, "KvTransfer/Push"),
    (Role.DECODE, "WorkerStatus/Watch"),
    (Role.COLOCATED, "DecodeWorker/Decode"),
    (Role.COLOCATED, "DecodeWorker/Release"),
    (Role.COLOCATED, "WorkerAdapters/Prefetch"),
    (Role.COLOCATED, "WorkerStatus/Watch"),
)


def request_for(site: Site, rpc: str) -> Message:
    match rpc.split("/")[1]:
        case "Prefill":
            return a_prefill(site)
        case "Decode":
            return a_decode(site)
        case "Push":
            return a_header(site)
        case "Watch":
            wanted = [site.alice.digest]
            return workers_pb2.WatchRequest(
                interval=0.05, content_address="127.0.0.1:1", wanted=wanted, unwanted=wanted
            )
        case "Find":
            return adapter_content_pb2.FindContent(digest=site.alice.digest)
        case "Read":
            return adapter_content_pb2.ReadContent(digest=site.alice.digest, file=LORA_FILES[0])
        case "Release":
            return workers_pb2.ReleaseRequest(handle="h")
        case _:
            return a_prefill(site).adapter


async def call(site: Site, role: Role, rpc: str, message: bytes, caller: str = "") -> tuple[grpc.StatusCode, str]:
    """How the call ends: its status and its sentence. For a Decode call, how the choice does."""
    async with ClusterChannel(site.workers[role].record.address, SECRET, caller=caller) as channel:
        if rpc.endswith("Push"):
            stream = channel.stream_stream(METHOD)(metadata=((HEADER_KEY, message),), timeout=SECONDS)
            ended = status_of(stream)  # a write after the end makes grpc.aio put an error of its own in its place
            with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
                await stream.write(bytes(100))
                await stream.done_writing()
                await stream.read()
            return await ended
        elif rpc.endswith("Decode"):
            command = b"\x12" + varint(len(message)) + message  # a DecodeCommand with it as `start`
            stream = channel.stream_stream(f"/preft.v1.{rpc}")(timeout=SECONDS)
            with suppress(grpc.aio.AioRpcError):  # the call may be refused before the first command
                await stream.write(command)
                await stream.done_writing()
        else:
            stream = channel.unary_stream(f"/preft.v1.{rpc}")(message, timeout=SECONDS)
        ends = []
        with suppress(grpc.aio.AioRpcError):
            async for answer in stream:
                if rpc.endswith("Decode"):
                    ends += [event.error for event in workers_pb2.DecodeEvents.FromString(answer).events]
        for error in ends:
            assert error.code not in ("engine_failed", "internal_error"), error.message
        return await stream.code(), await stream.details()


async def healthy(site: Site, role: Role) -> bool:
    """Whether the worker answers its next call."""
    async with grpc.aio.insecure_channel(site.workers[role].record.address) as channel:
        reply = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
    return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)


async def answered_right(site: Site) -> None:
    """A good request beside the others: prefill with the adapter, KV to the decode worker, its tokens."""
    handle, sampling = uuid.uuid4().hex, Sampling(max_tokens=6, temperature=0.0, ignore_eos=True)
    expected = tokens_of(site.alice.digest, PROMPT, sampling)
    request = a_prefill(site)
    request.request_id = handle
    request.sampling.CopyFrom(sampling_to_proto(sampling))
    request.target.handle = handle
    async with ClusterChannel(site.workers[Role.PREFILL].record.address, SECRET) as channel:
        events = [event async for event in workers_pb2_grpc.PrefillWorkerStub(channel).Prefill(request, timeout=60)]
    [first] = events[0].first_tokens.choices[0].token_ids
    decode = a_decode(site)
    decode.request_id, decode.handle, decode.kv_timeout = handle, handle, 20
    decode.sampling.CopyFrom(request.sampling)
    decode.choices[0].output_token_ids[:] = [first]
    async with ClusterChannel(site.workers[Role.DECODE].record.address, SECRET) as channel:
        stream = DecodeStream(workers_pb2_grpc.DecodeWorkerStub(channel), "decode", lambda: None)
        [choice] = stream.start(decode, 60)
        assert [first, *await rest(choice)] == expected
        await stream.close()
    colocated = a_decode(site)
    colocated.request_id = handle
    colocated.sampling.CopyFrom(request.sampling)
    del colocated.choices[0].output_token_ids[:]
    async with ClusterChannel(site.workers[Role.COLOCATED].record.address, SECRET) as channel:
        stream = DecodeStream(workers_pb2_grpc.DecodeWorkerStub(channel), "colocated", lambda: None)
        [choice] = stream.start(colocated, 60)
        assert await rest(choice) == expected
        await stream.close()
