"""The receiving side of KV over gRPC: turns a Push call into a header and frames.

`receive` owns memory, verification and handles.
"""

from __future__ import annotations

import asyncio
import ctypes
from collections.abc import AsyncIterator

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from preft.core.errors import InvalidRequest
from preft.core.request import KvHeader
from preft.rpc import kv_transfer_pb2
from preft.rpc.convert import header_from_proto
from preft.rpc.secret import PROOF_KEY, ClusterSecret
from preft.rpc.status import errors_reported
from preft.transfer.grpc_push import HEADER_KEY
from preft.transfer.receive import KvReceiver

SERVICE = "preft.v1.KvTransfer"

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # from malloc.h
_REUSED_BYTES = 32 << 20  # glibc's limit for M_MMAP_THRESHOLD


def kv_transfer_handler(receiver: KvReceiver, secret: ClusterSecret) -> grpc.GenericRpcHandler:
    """A handler for `grpc.aio.Server.add_generic_rpc_handlers`, without serializers: messages stay raw bytes.

    The call also makes the process's malloc keep the memory of messages for later messages.
    """
    _reuse_message_buffers()

    async def push(frames: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> bytes:
        async with errors_reported(context):
            header = decode_header(context.invocation_metadata())
            proof = ((PROOF_KEY, secret.proof(header.handle)),)
            await receiver.receive(header, _asked_for(frames, proof, context))
        return bytes(kv_transfer_pb2.PushReply().SerializeToString())

    return grpc.method_handlers_generic_handler(SERVICE, {"Push": grpc.stream_unary_rpc_method_handler(push)})


async def _asked_for(
    frames: AsyncIterator[bytes], proof: tuple[tuple[str, str]], context: grpc.aio.ServicerContext
) -> AsyncIterator[bytes]:
    """The frames. Asking for the first one sends the initial metadata, which tells the sender to start."""
    start = asyncio.ensure_future(context.send_initial_metadata(proof))
    try:
        await asyncio.shield(start)
    finally:
        await start  # even if the handle is given up now: gRPC can't end a call while metadata is half sent
    async for frame in frames:
        yield frame


def _reuse_message_buffers() -> None:
    """Makes glibc's malloc keep memory of a message's size. Does nothing with another malloc.

    Otherwise each frame's memory goes back to the kernel, and the next frame takes a page fault per page. The process
    keeps up to 64 MiB more.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _REUSED_BYTES)
        mallopt(_M_TRIM_THRESHOLD, 2 * _REUSED_BYTES)


def decode_header(metadata: grpc.aio.Metadata | None) -> KvHeader:
    """The header from a call's metadata. Raises InvalidRequest if it is absent or malformed."""
    encoded = dict(metadata or ()).get(HEADER_KEY)
    if not isinstance(encoded, bytes):
        raise InvalidRequest(f"the push has no {HEADER_KEY} in its metadata")
    try:
        return header_from_proto(kv_transfer_pb2.KvHeader.FromString(encoded))
    except DecodeError:
        raise InvalidRequest(f"{HEADER_KEY} is not a KvHeader") from None
    except InvalidRequest as error:
        raise InvalidRequest(f"the KV header is malformed: {error}", error.param) from None
