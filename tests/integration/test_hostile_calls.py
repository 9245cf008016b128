"""Hostile values in every field of every rpc of whole workers, and calls from outside the cluster.

Nothing outside a worker's own folder may change, each call ends with a status that says what is wrong, and the worker
serves as before.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from preft.core.cluster import Role
from preft.core.errors import TransferFailed
from preft.core.request import KvHeader
from preft.rpc import common_pb2
from preft.rpc.secret import CALL_KEY, ClusterSecret
from preft.transfer.grpc_push import GrpcKvSender
from preft.transfer.port import checksum_of, hash_prompt
from support.hostile_site import DONE, PROMPT, REFUSALS, RPCS, Site, call, healthy, request_for
from support.mutations import leaves
from support.worker_servers import SECRET


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    site = Site(tmp_path_factory.mktemp("hostile"))
    yield site
    site.close()


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
    code, says = site.loop.run_until_complete(call(site, role, rpc, message))
    assert code in DONE | REFUSALS, says
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
