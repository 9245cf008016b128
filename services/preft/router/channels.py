"""The router's gRPC connections to workers: one channel per address, kept while the worker is registered.

Owns the channels, the calls that only have their end left, and the releases under way; `close` ends all of them. gRPC
errors become PreftErrors here and nowhere else in the router.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import Any

import grpc
import grpc.aio

from preft.core.background import Background
from preft.core.cluster import AdapterPlace, Worker
from preft.core.errors import PreftError, WorkerLost
from preft.core.request import AdapterRef
from preft.router.decode_stream import CallCancelled, DecodeCall, DecodeStream
from preft.rpc import workers_pb2, workers_pb2_grpc
from preft.rpc.convert import adapter_to_proto, place_from_proto
from preft.rpc.liveness import ping_options
from preft.rpc.secret import ClusterChannel, ClusterSecret
from preft.rpc.status import error_from_rpc

OPTIONS = [
    ("grpc.max_send_message_length", -1),  # a prompt may have a million tokens
    ("grpc.max_receive_message_length", -1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),  # a worker that restarts at its address is found soon
    ("grpc.enable_http_proxy", 0),
]
RELEASE_SECONDS = 5.0
DRAIN_SECONDS = 600.0  # a worker that left the registry may still finish what it has


@dataclass(slots=True)
class WorkerStubs:
    """One channel and the services on it. Which of them the worker has depends on its role."""

    channel: ClusterChannel
    prefill: Any
    decode: Any
    adapters: Any
    stream: DecodeStream | None = None

    async def close(self, grace: float) -> None:
        """Lets the calls under way end, for at most `grace` seconds."""
        if self.stream is not None:
            await self.stream.finish(grace)
        await self.channel.close(grace)


class WorkerChannels:
    """Calls to workers. Use it inside one event loop."""

    def __init__(self, secret: ClusterSecret, on_lost: Callable[[Worker], None]) -> None:
        """`on_lost` is told of each worker that couldn't be reached or broke off."""
        self._secret = secret
        self._on_lost = on_lost
        self._stubs: dict[str, WorkerStubs] = {}
        self._ending: set[Any] = set()
        self._background = Background()

    def prefill(self, worker: Worker, request: workers_pb2.PrefillRequest, timeout: float) -> Any:
        """Starts a Prefill call, to be read with `read`."""
        return self._stubs_of(worker.address).prefill.Prefill(request, timeout=timeout)

    async def prefetch(self, worker: Worker, adapter: AdapterRef, timeout: float) -> None:
        """Has `worker` bring `adapter` into host memory, and waits for it. Raises the PreftError that it ended with."""
        try:
            await self._stubs_of(worker.address).adapters.Prefetch(adapter_to_proto(adapter), timeout=timeout)
        except grpc.aio.AioRpcError as rpc_error:
            raise self._error(rpc_error, worker) from rpc_error

    async def where(self, worker: Worker, adapter: AdapterRef, timeout: float) -> AdapterPlace:
        """Where `worker` has `adapter`. Raises the PreftError that the call ended with."""
        try:
            reply = await self._stubs_of(worker.address).adapters.Where(adapter_to_proto(adapter), timeout=timeout)
        except grpc.aio.AioRpcError as rpc_error:
            raise self._error(rpc_error, worker) from rpc_error
        return place_from_proto(worker.id, reply)

    def decode(self, worker: Worker, request: workers_pb2.DecodeRequest, timeout: float) -> list[DecodeCall]:
        """Starts to decode the request's choices."""
        stubs = self._stubs_of(worker.address)
        if stubs.stream is None or stubs.stream.broken:
            stubs.stream = DecodeStream(stubs.decode, worker.id, partial(self._on_lost, worker))
        return stubs.stream.start(request, timeout)

    async def read(self, call: Any, worker: Worker) -> Any | None:
        """The Prefill call's next message, or None at its good end.

        Raises the PreftError it ended with, or CallCancelled if `call.cancel` was used.
        """
        try:
            message = await call.read()
        except grpc.aio.AioRpcError as rpc_error:
            raise self._error(rpc_error, worker) from rpc_error
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise CallCancelled from None
        return None if message is grpc.aio.EOF else message

    def let_end(self, call: Any) -> None:
        """Keeps a call that has nothing more to say until its end has come: dropping it would cancel it."""
        if not call.done():
            self._ending.add(call)
            call.add_done_callback(self._ending.discard)

    def release(self, worker: Worker, handle: str) -> None:
        """Tells a decode worker, in the background, that nobody will claim `handle` (any more)."""
        self._background.start(self._release(worker, handle), f"the release of a KV handle at {worker.id}")

    def retain(self, addresses: Collection[str]) -> None:
        """Lets go of channels to other addresses, in the background and once their calls have ended."""
        for address in self._stubs.keys() - set(addresses):
            closing = self._stubs.pop(address).close(grace=DRAIN_SECONDS)
            self._background.start(closing, f"the end of the connection to {address}")

    async def close(self) -> None:
        """Ends everything, once the releases under way had their time."""
        await self._background.finish(RELEASE_SECONDS)
        for call in list(self._ending):
            call.cancel()
        for stubs in self._stubs.values():
            await stubs.close(grace=0)
        self._stubs.clear()

    async def _release(self, worker: Worker, handle: str) -> None:
        # A worker that can't be told drops the handle when its lease runs out.
        with contextlib.suppress(grpc.aio.AioRpcError):
            request = workers_pb2.ReleaseRequest(handle=handle)
            await self._stubs_of(worker.address).decode.Release(request, timeout=RELEASE_SECONDS)

    def _error(self, rpc_error: grpc.aio.AioRpcError, worker: Worker) -> PreftError:
        error = error_from_rpc(rpc_error, worker.id)
        if type(error) is WorkerLost:
            self._on_lost(worker)
        return error

    def _stubs_of(self, address: str) -> WorkerStubs:
        stubs = self._stubs.get(address)
        if stubs is None:
            channel = ClusterChannel(address, self._secret, [*OPTIONS, *ping_options()])
            stubs = self._stubs[address] = WorkerStubs(
                channel,
                workers_pb2_grpc.PrefillWorkerStub(channel),  # type: ignore[no-untyped-call]
                workers_pb2_grpc.DecodeWorkerStub(channel),  # type: ignore[no-untyped-call]
                workers_pb2_grpc.WorkerAdaptersStub(channel),  # type: ignore[no-untyped-call]
            )
        return stubs
