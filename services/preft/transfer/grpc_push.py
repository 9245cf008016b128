"""The sending side of KV over gRPC: the header as request metadata, the bytes as raw messages without protobuf.

`grpc_receive` is the receiving side.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio

from preft.core.errors import TransferFailed
from preft.core.request import KvHeader
from preft.rpc.convert import header_to_proto
from preft.rpc.liveness import ping_options
from preft.rpc.secret import PROOF_KEY, ClusterChannel, ClusterSecret, equal_codes

METHOD = "/preft.v1.KvTransfer/Push"
HEADER_KEY = "preft-kv-header-bin"
REFUSAL_SECONDS = 1.0  # wait for the status of a receiver that hasn't proved that it knows the secret
MAX_CHANNELS = 256  # kept open; each restart of a worker has a new address
FRAME_BYTES = 1 << 20  # the fastest size measured: half or twice as much costs 10-30%

_CHANNEL_OPTIONS = [
    ("grpc.initial_reconnect_backoff_ms", 100),  # a worker may restart on the same port
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.enable_http_proxy", 0),
]


class GrpcKvSender:
    """A KvSender with one channel per address. Only receivers that know the cluster's secret get bytes."""

    def __init__(self, secret: ClusterSecret) -> None:
        self._secret = secret
        self._channels: dict[str, ClusterChannel] = {}  # least recently used first
        self._pushes: Counter[str] = Counter()  # under way, by address

    async def push(self, address: str, header: KvHeader, payload: memoryview, *, timeout: float) -> None:
        """See `KvSender.push`. `address` is `host:port` of the decode worker."""
        async with self._channel(address) as channel:
            # On the wire this is a stream_unary call. But grpc.aio loses the status of a stream_unary call that the
            # receiver ends early.
            metadata = ((HEADER_KEY, header_to_proto(header).SerializeToString()),)
            call = channel.stream_stream(METHOD)(metadata=metadata, timeout=timeout)
            status = status_of(call)
            known: asyncio.Future[bool] = asyncio.get_running_loop().create_future()  # if the peer knows the secret
            writing = asyncio.create_task(self._write(call, header.handle, known, payload))
            try:
                await asyncio.wait({status, writing}, return_when=asyncio.FIRST_COMPLETED)
                if writing.done():
                    writing.result()
                if known.done() and not known.result():  # a receiver of the cluster that refuses also sends no proof
                    await asyncio.wait({status}, timeout=REFUSAL_SECONDS)
                    if not status.done():
                        raise _stranger(address)
                code, details = await status
            finally:
                call.cancel()  # does nothing to a finished call
                writing.cancel()
                await asyncio.wait({writing})
        if code is not grpc.StatusCode.OK:
            raise TransferFailed(f"the KV push to {address} failed: {details or code.name}")
        if not (known.done() and known.result()):
            raise _stranger(address)

    async def _write(
        self,
        call: grpc.aio.StreamStreamCall[bytes, bytes],
        handle: str,
        known: asyncio.Future[bool],
        payload: memoryview,
    ) -> None:
        """Sends the payload, or nothing if the receiver's initial metadata doesn't prove that it knows the secret."""
        try:
            # Metadata comes when the receiver has room; gRPC alone would buffer megabytes at the receiver.
            shown = dict(await call.initial_metadata()).get(PROOF_KEY)
            known.set_result(isinstance(shown, str) and equal_codes(shown, self._secret.proof(handle)))
            if not known.result():
                return
            async for frame in self.frames(payload):
                await call.write(frame)
            await call.done_writing()
            await call.read()  # the reply; the status comes only after this read
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            return  # the call has ended, and its status tells the reason

    @asynccontextmanager
    async def _channel(self, address: str) -> AsyncIterator[ClusterChannel]:
        """The channel to `address`. Closes the least recently used idle channels beyond MAX_CHANNELS."""
        channel = self._channels.pop(address, None)
        if channel is None:
            channel = ClusterChannel(address, self._secret, [*_CHANNEL_OPTIONS, *ping_options()])
        self._channels[address] = channel
        self._pushes[address] += 1
        try:
            yield channel
        finally:
            self._pushes[address] -= 1
            self._pushes += Counter()  # drops zeros
            idle = [other for other in self._channels if other not in self._pushes]
            for other in idle[: max(0, len(self._channels) - MAX_CHANNELS)]:
                await self._channels.pop(other).close()

    async def frames(self, payload: memoryview) -> AsyncIterator[bytes]:
        """The messages of the call, in order."""
        for start in range(0, len(payload), FRAME_BYTES):
            yield bytes(payload[start : start + FRAME_BYTES])

    async def close(self) -> None:
        """See `KvSender.close`."""
        for channel in self._channels.values():
            await channel.close()
        self._channels.clear()


def _stranger(address: str) -> TransferFailed:
    return TransferFailed(f"the KV push to {address} failed: what answers there is no worker of this cluster")


def status_of(call: grpc.aio.StreamStreamCall[bytes, bytes]) -> asyncio.Future[Any]:
    """The code and details with which the call ends.

    If a write fails because the receiver has ended the call, grpc.aio replaces the status by an INTERNAL error of its
    own. So this future takes the status as soon as it comes.
    """
    status: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    def on_end(call: grpc.aio.StreamStreamCall[bytes, bytes]) -> None:
        if not status.done():
            status.set_result((_at_once(call.code()), _at_once(call.details())))

    call.add_done_callback(on_end)
    return status


def _at_once(ended: Coroutine[Any, Any, Any]) -> Any:
    """The result of a coroutine that never waits."""
    try:
        ended.send(None)
    except StopIteration as end:
        return end.value
    raise RuntimeError("a gRPC call reported its end before it had a status")
