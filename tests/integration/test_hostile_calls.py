"""Hostile values in every field of every rpc of whole workers, and calls from outside the cluster.

Nothing outside a worker's own folder may change, each call ends with a status that says what is wrong, and the worker
serves as before.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from preft.adapters.formats.digest import LORA_FILES
from preft.core.cluster import Role
from preft.core.errors import TransferFailed
from preft.core.request import KvHeader, Sampling
from preft.rpc import adapter_content_pb2, common_pb2, kv_transfer_pb2, workers_pb2
from preft.rpc.convert import sampling_to_proto
from preft.rpc.secret import CALL_KEY, ClusterChannel, ClusterSecret
from preft.transfer.grpc_push import HEADER_KEY, METHOD, GrpcKvSender, status_of
from preft.transfer.port import checksum_of, hash_prompt
from preft.worker.server import WorkerServer
from support.fakes import FakeStore
from support.worker_servers import SECRET, StartFake, settings_for, start
from support.worker_services import write_adapter

PROMPT = (5, 6, 7, 8, 9)
DIGEST = "d0" * 32
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
            settings = settings_for(folder, colocated=role is Role.COLOCATED)
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


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    site = Site(tmp_path_factory.mktemp("hostile"))
    yield site
    site.close()


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


def leaves(message: Message) -> list[tuple[Message, FieldDescriptor]]:
    """All fields of a message and of those in it that aren't messages."""
    found: list[tuple[Message, FieldDescriptor]] = []
    for field in message.DESCRIPTOR.fields:
        if field.message_type is not None and not field.is_repeated:
            found += leaves(getattr(message, field.name))
        elif field.message_type is not None and not field.message_type.GetOptions().map_entry:
            for part in getattr(message, field.name):
                found += leaves(part)
        else:
            found.append((message, field))
    return found


def values_of(field: FieldDescriptor, texts: list[str]) -> st.SearchStrategy[Any]:
    """Values that the wire lets through: extremes, what isn't a number, and texts from elsewhere."""
    match field.cpp_type:
        case FieldDescriptor.CPPTYPE_STRING:
            if field.type == FieldDescriptor.TYPE_BYTES:
                return st.binary(max_size=64)
            return st.sampled_from(texts) | st.text(max_size=80)
        case FieldDescriptor.CPPTYPE_BOOL:
            return st.booleans()
        case FieldDescriptor.CPPTYPE_DOUBLE:
            return st.floats() | st.sampled_from([float("nan"), float("inf"), -1.0, 1e308])
        case FieldDescriptor.CPPTYPE_INT64:
            return st.integers(-(2**63), 2**63 - 1) | st.sampled_from([-(2**63), 2**63 - 1])
        case FieldDescriptor.CPPTYPE_UINT64:
            return st.sampled_from([0, 1, 2**32, 2**63, 2**64 - 1])
        case _:
            return st.sampled_from([0, 1, 2, 999, 1000, 1025, 2**31 - 1, 2**31, 2**32 - 1])


def spoil(data: st.DataObject, site: Site, message: Message) -> None:
    """One to three fields of `message` get hostile values."""
    for _ in range(data.draw(st.integers(1, 3))):
        owner, field = data.draw(st.sampled_from(leaves(message)))
        if field.message_type is not None:  # logit_bias
            key, value = data.draw(st.sampled_from([0, 999, 2**32 - 1])), data.draw(st.floats())
            getattr(owner, field.name)[key] = value
        elif field.is_repeated:
            del getattr(owner, field.name)[:]
            getattr(owner, field.name).extend(data.draw(st.lists(values_of(field, site.hostile_text()), max_size=200)))
        else:
            setattr(owner, field.name, data.draw(values_of(field, site.hostile_text())))


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
            command = workers_pb2.DecodeCommand(start=workers_pb2.DecodeRequest.FromString(message))
            stream = channel.stream_stream(f"/preft.v1.{rpc}")(timeout=SECONDS)
            with suppress(grpc.aio.AioRpcError):  # the call may be refused before the first command
                await stream.write(command.SerializeToString())
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


@pytest.mark.parametrize(("role", "rpc"), RPCS, ids=lambda value: str(value))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_no_value_in_a_call_does_harm(site: Site, role: Role, rpc: str, data: st.DataObject) -> None:
    message = request_for(site, rpc)
    spoil(data, site, message)
    code, says = site.loop.run_until_complete(call(site, role, rpc, message.SerializeToString()))
    assert code in DONE | REFUSALS, says
    assert "Traceback" not in says
    assert site.seen() == site.before
    assert site.loop.run_until_complete(healthy(site, role))


@pytest.mark.parametrize(("role", "rpc"), [one for one in RPCS if "Push" not in one[1]], ids=lambda value: str(value))
@settings(max_examples=20, deadline=None)
@given(message=st.binary(max_size=60))
def test_bytes_that_are_no_message_do_no_harm(site: Site, role: Role, rpc: str, message: bytes) -> None:
    if not rpc.endswith("Decode"):
        site.loop.run_until_complete(call(site, role, rpc, message))
    assert site.seen() == site.before


@pytest.mark.parametrize("role", [Role.PREFILL, Role.COLOCATED])
def test_a_path_is_no_digest(site: Site, role: Role) -> None:
    """A worker once took it for the folder of a damaged copy, and deleted it."""
    for digest in (str(site.outside), f"../../../..{site.outside}", str(Path(site.alice.source))):
        ref = common_pb2.AdapterRef(name="alice", digest=digest, source=site.alice.source)
        code, says = site.loop.run_until_complete(call(site, role, "WorkerAdapters/Prefetch", ref.SerializeToString()))
        assert (code, says) == (
            grpc.StatusCode.INVALID_ARGUMENT,
            "an adapter's digest is 64 lowercase hexadecimal digits",
        )
    assert site.seen() == site.before


@pytest.mark.parametrize(("role", "rpc"), RPCS, ids=lambda value: str(value))
@pytest.mark.parametrize("caller", ["x" * 257, "x" * 5000, "../../etc/passwd", " ", "a, b; c=d %00"])
def test_no_caller_s_name_does_harm(site: Site, role: Role, rpc: str, caller: str) -> None:
    message = request_for(site, rpc).SerializeToString()
    code, says = site.loop.run_until_complete(call(site, role, rpc, message, caller))
    assert code in DONE | REFUSALS, says
    if len(caller) > 256 and rpc.split("/")[1] in ("Prefill", "Decode", "Watch"):
        assert (code, says[:6]) == (grpc.StatusCode.INVALID_ARGUMENT, "caller")
    assert site.loop.run_until_complete(healthy(site, role))


# Calls from outside the cluster


@pytest.mark.parametrize(("role", "rpc"), [*RPCS, (Role.DECODE, "No/Such")])
@pytest.mark.parametrize("code", [None, "", "0" * 64, "another", "elsewhere"])
def test_calls_without_the_secret_are_refused(site: Site, role: Role, rpc: str, code: str | None) -> None:
    address = site.workers[role].record.address
    if code == "another":
        code = ClusterSecret("of another cluster").call_code(address)
    elif code == "elsewhere":  # seen by who took over the port of a dead worker
        code = SECRET.call_code("127.0.0.1:1")
    metadata = () if code is None else ((CALL_KEY, code),)

    async def ended() -> tuple[grpc.StatusCode, str]:
        async with grpc.aio.insecure_channel(address) as channel:
            stream = channel.stream_stream(f"/preft.v1.{rpc}")(metadata=metadata, timeout=10)
            return await stream.code(), await stream.details()

    status, says = site.loop.run_until_complete(ended())
    assert status is grpc.StatusCode.UNAUTHENTICATED
    assert "secret" in says
    assert "of these tests" not in says


class Stranger(grpc.GenericRpcHandler):
    """Takes over the address of a worker, and all that it is sent."""

    def __init__(self, proof: str | None, status: grpc.StatusCode = grpc.StatusCode.OK) -> None:
        self.proof = proof
        self.status = status
        self.got: list[bytes] = []

    def service(self, details: Any) -> Any:
        async def take(frames: AsyncIterator[bytes], context: Any) -> bytes:
            if self.status is not grpc.StatusCode.OK:
                await context.abort(self.status, "no")
            await context.send_initial_metadata((("preft-cluster-proof", self.proof),) if self.proof else ())
            async for frame in frames:
                self.got.append(frame)
            return b""

        return grpc.stream_unary_rpc_method_handler(take)


@pytest.mark.parametrize("proof", [None, "0" * 64, SECRET.proof("another")])
async def test_kv_goes_to_workers_of_the_cluster_alone(proof: str | None) -> None:
    stranger, sender = Stranger(proof), GrpcKvSender(SECRET)
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((stranger,))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    payload = b"somebody's prompt" * 100
    header = KvHeader("h", "fp", "", 5, len(payload), checksum_of(payload), 1, hash_prompt(PROMPT))
    try:
        with pytest.raises(TransferFailed, match="no worker of this cluster"):
            await sender.push(f"127.0.0.1:{port}", header, memoryview(payload), timeout=10)
        stranger.proof = SECRET.proof("h")
        await sender.push(f"127.0.0.1:{port}", header, memoryview(payload), timeout=10)
        assert b"".join(stranger.got) == payload
    finally:
        await sender.close()
        await server.stop(None)
