"""The router's gRPC connections to workers: one channel per address, kept while the worker is registered.

The module owns the channels, calls that only wait for their end, and releases under way; `close` ends all of them. In
the router, gRPC errors of unary and Prefill calls become PreftErrors here alone.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Set
from dataclasses import dataclass
from functools import partial
from typing import Any

import grpc
import grpc.aio

from preft.core.background import Background
from preft.core.cluster import StatusUpdate, Worker, WorkerStatus
from preft.core.errors import PreftError, WorkerLost
from preft.core.request import AdapterRef
from preft.router.decode_stream import CallCancelled, DecodeCall, DecodeStream
from preft.rpc import workers_pb2, workers_pb2_grpc
from preft.rpc.convert import adapter_to_proto, status_from_proto
from preft.rpc.liveness import ping_options
from preft.rpc.secret import ClusterChannel, ClusterSecret
from preft.rpc.status import error_from_rpc

OPTIONS = [
    ("grpc.max_send_message_length", -1),  # a prompt may have a million tokens
    ("grpc.max_receive_message_length", -1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),  # finds a worker that restarts at its address soon
    ("grpc.enable_http_proxy", 0),
]
RELEASE_SECONDS = 5.0
DRAIN_SECONDS = 600.0  # a worker that left the registry may still finish its calls


@dataclass(slots=True)
class WorkerStubs:
    """One channel and the stubs on it. The worker's role decides which of the services exist."""

    channel: ClusterChannel
    prefill: Any
    decode: Any
    adapters: Any
    status: Any
    stream: DecodeStream | None = None

    async def close(self, grace: float) -> None:
        """Waits at most `grace` seconds for running calls, then closes the channel."""
        if self.stream is not None:
            await self.stream.finish(grace)
        await self.channel.close(grace)


@dataclass(frozen=True, slots=True)
class Wants:
    """Digests of adapters for which requests begin and cease to wait for one worker, and the oldest wait for a slot."""

    wanted: Set[str]
    unwanted: Set[str]
    slot_wait_ms: int  # 0: none waits for a slot


class WorkerChannels:
    """Calls to workers. Use it inside one event loop."""

    def __init__(
        self, secret: ClusterSecret, caller: str, on_lost: Callable[[Worker], None], *, content_address: str = ""
    ) -> None:
        """Calls carry the name `caller`. `on_lost` is called with each worker whose connection failed or broke.

        Workers are told of this process's AdapterContent service at `content_address`, if there is one.
        """
        self._secret = secret
        self._caller = caller
        self._on_lost = on_lost
        self._content_address = content_address
        self._stubs: dict[str, WorkerStubs] = {}
        self._ending: set[Any] = set()
        self._background = Background()

    def prefill(self, worker: Worker, request: workers_pb2.PrefillRequest, timeout: float) -> Any:
        """Starts a Prefill call; `read` returns its messages."""
        return self._stubs_of(worker.address).prefill.Prefill(request, timeout=timeout)

    async def prefetch(self, worker: Worker, adapter: AdapterRef, timeout: float) -> None:
        """Makes `worker` load `adapter` into host memory, and waits for it. Raises the call's PreftError."""
        try:
            await self._stubs_of(worker.address).adapters.Prefetch(adapter_to_proto(adapter), timeout=timeout)
        except grpc.aio.AioRpcError as rpc_error:
            raise self._error(rpc_error, worker) from rpc_error

    async def watch(
        self, worker: Worker, interval: float, silence: float, wants: AsyncIterator[Wants]
    ) -> AsyncGenerator[StatusUpdate, None]:
        """Yields the worker's status updates, one per `interval` seconds, or up to five if its adapters change.

        `wants` is what the worker is told meanwhile. Raises the call's PreftError, and WorkerLost after `silence`
        seconds without an update.
        """
        call = self._stubs_of(worker.address).status.Watch(self._watch_requests(interval, wants))
        status = WorkerStatus()
        try:
            while True:
                async with asyncio.timeout(silence):
                    message = await call.read()
                if message is grpc.aio.EOF:
                    return
                update = status_from_proto(message, status)
                status = update.status
                yield update
        except TimeoutError:
            raise WorkerLost(f"worker {worker.id} has told nothing for {silence:g} s") from None
        except grpc.aio.AioRpcError as rpc_error:
            raise error_from_rpc(rpc_error, worker.id) from rpc_error
        finally:
            call.cancel()

    async def _watch_requests(
        self, interval: float, wants: AsyncIterator[Wants]
    ) -> AsyncIterator[workers_pb2.WatchRequest]:
        yield workers_pb2.WatchRequest(interval=interval, content_address=self._content_address)
        async for change in wants:
            yield workers_pb2.WatchRequest(
                wanted=change.wanted, unwanted=change.unwanted, slot_wait_ms=change.slot_wait_ms
            )

    def decode(self, worker: Worker, request: workers_pb2.DecodeRequest, timeout: float) -> list[DecodeCall]:
        """Starts to decode the request's choices; the calls are in the order of the choices."""
        stubs = self._stubs_of(worker.address)
        if stubs.stream is None or stubs.stream.broken:
            stubs.stream = DecodeStream(stubs.decode, worker.id, partial(self._on_lost, worker))
        return stubs.stream.start(request, timeout)

    async def read(self, call: Any, worker: Worker) -> Any | None:
        """Returns the Prefill call's next message, or None after its last one.

        Raises the call's PreftError, or CallCancelled after `call.cancel`.
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
        """Keeps a reference to a call whose messages are all read until it ends: gRPC cancels a dropped call."""
        if not call.done():
            self._ending.add(call)
            call.add_done_callback(self._ending.discard)

    def release(self, worker: Worker, handle: str) -> None:
        """Tells a decode worker, in the background, that `handle` gets no further claims."""
        self._background.start(self._release(worker, handle), f"the release of a KV handle at {worker.id}")

    def retain(self, addresses: Collection[str]) -> None:
        """Closes channels to all other addresses, in the background, after their calls have ended."""
        for address in self._stubs.keys() - set(addresses):
            closing = self._stubs.pop(address).close(grace=DRAIN_SECONDS)
            self._background.start(closing, f"the end of the connection to {address}")

    async def close(self) -> None:
        """Waits RELEASE_SECONDS for releases under way, then ends all calls and channels."""
        await self._background.finish(RELEASE_SECONDS)
        for call in list(self._ending):
            call.cancel()
        for stubs in self._stubs.values():
            await stubs.close(grace=0)
        self._stubs.clear()

    async def _release(self, worker: Worker, handle: str) -> None:
        # A worker that this call doesn't reach drops the handle when its lease expires.
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
            channel = ClusterChannel(address, self._secret, [*OPTIONS, *ping_options()], caller=self._caller)
            stubs = self._stubs[address] = WorkerStubs(
                channel,
                workers_pb2_grpc.PrefillWorkerStub(channel),  # type: ignore[no-untyped-call]
                workers_pb2_grpc.DecodeWorkerStub(channel),  # type: ignore[no-untyped-call]
                workers_pb2_grpc.WorkerAdaptersStub(channel),  # type: ignore[no-untyped-call]
                workers_pb2_grpc.WorkerStatusStub(channel),  # type: ignore[no-untyped-call]
            )
        return stubs
