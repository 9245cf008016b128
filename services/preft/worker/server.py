"""One worker process of any role: engine, staging arena, gRPC services, registration.

Owns the order of start and stop, and the registration's renewal. The packages `prefill`, `decode` and `colocated` own
the services of each role. Ray or a test starts the worker.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import logging
import os
from typing import TYPE_CHECKING

import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from preft.adapters.sources.content_service import ContentService
from preft.adapters.sources.peers import Peers
from preft.adapters.store.adapter_store import AdapterStore
from preft.adapters.store.disk_tier import DiskTier
from preft.core.background import Background
from preft.core.cluster import Role, TierTotals, Worker, WorkerStatus
from preft.core.errors import PreftError
from preft.core.ports import StateStore
from preft.core.settings import PrefillSettings, Settings
from preft.engine.port import Engine, EngineInfo
from preft.memory.arena import StagingArena
from preft.rpc import adapter_content_pb2, common_pb2, workers_pb2, workers_pb2_grpc
from preft.rpc.adapter_content_pb2_grpc import add_AdapterContentServicer_to_server
from preft.rpc.convert import adapter_from_proto
from preft.rpc.readable import ReadableMessages
from preft.rpc.secret import ClusterSecret, OnlyTheCluster
from preft.rpc.server_options import WORKER_SERVER_OPTIONS
from preft.rpc.status import errors_reported
from preft.transfer.grpc_push import GrpcKvSender
from preft.transfer.handles import HandleTable
from preft.transfer.port import KvSender
from preft.worker.colocated import wiring as colocated
from preft.worker.decode import wiring as decode
from preft.worker.engine_watch import EngineWatch
from preft.worker.prefill import wiring as prefill
from preft.worker.role import AddServices, Parts
from preft.worker.setup import WorkerSetup
from preft.worker.status import StatusService
from preft.worker.usage import Usage

if TYPE_CHECKING:
    from preft.engine.vllm_engine import VllmEngine

logger = logging.getLogger(__name__)

ROLES: dict[Role, AddServices] = {
    Role.PREFILL: prefill.add_services,
    Role.DECODE: decode.add_services,
    Role.COLOCATED: colocated.add_services,
}

STARTING_LIFETIME = 600.0  # seconds for which a worker is registered while its engine loads
LIFETIME = 30.0  # seconds for which a serving worker is registered
RENEWAL_SECONDS = 10.0
RETRY_SECONDS = 1.0  # after a renewal that failed
DRAIN_SECONDS = 0.5  # for the routers to hear that the worker ends
LOOK_SECONDS = 0.1  # while the worker waits for the end of its requests
QUIET_SECONDS = 1.0  # without requests, until a drained worker counts as idle: KV for it may be under way


class WorkerServer:
    """A started worker: `start` makes it, `close` ends it, `died` returns when its engine has died or hung too long."""

    def __init__(
        self,
        engine: Engine,
        server: grpc.aio.Server,
        store: StateStore,
        record: Worker,
        sender: KvSender,
        arena: StagingArena,
        disk: DiskTier | None,
        adapters: AdapterStore | None,
        peers: Peers | None,
        engine_timeout: float,
    ) -> None:
        self._engine = engine
        self._engine_watch = EngineWatch(engine, engine_timeout)
        self._server = server
        self._store = store
        self._record = record
        self._sender = sender
        self._arena = arena
        self._disk = disk
        self._adapters = adapters
        self._handles: HandleTable | None = None
        self._usage = Usage(record.adapter_slots)
        self._status = StatusService(self._measure, self._usage, adapters, peers)
        self._is_registered = False
        self._background = Background()
        self._opened = contextlib.AsyncExitStack()

    @classmethod
    async def start(
        cls,
        setup: WorkerSetup,
        worker_id: str,
        host: str,
        store: StateStore,
        start_engine: StartEngine,
        sender: KvSender | None = None,
        *,
        port: int = 0,
        advertise_host: str | None = None,
    ) -> WorkerServer:
        """Starts the engine (25-45 s on CPU), then serves on `host` and registers its address for other processes.

        `port` 0 is any free one. `advertise_host` replaces `host` in the registered address.

        Raises the errors of `start_engine`, and ConfigError if `host` needs `tls`; then nothing is left running.
        """
        settings, role, secret = setup.settings, setup.role, setup.secret
        settings.check_internal_host(host)
        own = settings.engine(role)
        record = Worker(
            id=worker_id,
            role=role,
            pid=os.getpid(),
            max_num_seqs=own.max_num_seqs,
            adapter_slots=own.max_loras if isinstance(own, PrefillSettings) else 0,
        )
        async with contextlib.AsyncExitStack() as opened:
            opened.push_async_callback(store.remove_worker, worker_id)
            await store.put_worker(record, STARTING_LIFETIME)
            arena = StagingArena.create(setup.staging_bytes)
            opened.callback(arena.close)
            memory = StagingArena.create(settings.store.host_bytes) if record.adapter_slots else None
            if memory is not None:
                opened.callback(memory.close)
            engine = await start_engine(settings, role, arena.path, memory.path if memory else "")
            opened.push_async_callback(engine.close)
            info = engine.info
            identity = f"{setup.model}:{info.kv_layout}:{info.max_model_len}"
            if role is Role.COLOCATED:
                identity += f":{worker_id}"
            else:
                _warn_of_little_room(role, arena.capacity, info)
            record = dataclasses.replace(
                record,
                fingerprint=hashlib.sha256(identity.encode()).hexdigest(),
                engine_pids=info.pids,
                block_size=info.block_size,
                block_bytes=info.block_bytes,
                kv_blocks=info.kv_blocks,
                staging_bytes=arena.capacity,
            )
            disk = adapters = peers = None
            if memory is not None:
                opened_adapters = setup.open_adapters(store, worker_id, memory, engine, record.adapter_slots)
                disk, adapters, peers = await opened.enter_async_context(opened_adapters)
            sender = sender or GrpcKvSender(secret)
            opened.push_async_callback(sender.close)
            guard = OnlyTheCluster(secret)
            server = grpc.aio.server(options=WORKER_SERVER_OPTIONS, interceptors=[guard, ReadableMessages()])
            worker = cls(engine, server, store, record, sender, arena, disk, adapters, peers, own.engine_timeout)
            names = worker._add_services(settings, role, secret)
            if worker._handles is not None:
                opened.callback(worker._handles.close)
            address = guard.listen(server, host, port, advertise_host)
            worker._record = dataclasses.replace(worker._record, address=address)
            await server.start()
            opened.push_async_callback(server.stop, 0)
            await worker._register()
            worker._opened = opened.pop_all()
        worker._background.every(worker._until_renewal, worker._register, f"the registration of {worker_id}")
        worker._background.start(worker._engine_watch.run(), f"the watch on the engine of {worker_id}")
        logger.info("%s worker %s serves %s on %s", role.value, worker_id, ", ".join(names), address)
        return worker

    @property
    def record(self) -> Worker:
        """The worker as registered."""
        return self._record

    async def died(self) -> str:
        """Returns the reason once the engine has died, or was killed because it hung."""
        return await self._engine.wait_dead()

    async def close(self) -> None:
        """Tells the routers, removes the registration, stops serving, and ends all parts of the worker."""
        self.drain()
        await self._background.close()
        with contextlib.suppress(PreftError):
            await self._store.remove_worker(self._record.id)
        await self._status.drained(DRAIN_SECONDS)
        with contextlib.suppress(PreftError):
            await self._opened.aclose()

    def drain(self, but: str | None = None) -> None:
        """Tells the watching routers, but not the router `but`, at once to send nothing more.

        The worker still serves what comes.
        """
        self._status.drain(but)

    async def wait_idle(self) -> None:
        """Returns once no request has been here for QUIET_SECONDS."""
        quiet = 0.0
        while quiet < QUIET_SECONDS:
            await asyncio.sleep(LOOK_SECONDS)
            status = self.status()
            quiet = 0.0 if status.running or status.open_handles else quiet + LOOK_SECONDS

    def status(self, caller: str = "") -> WorkerStatus:
        """The worker's use at this moment, as the router `caller` is told it."""
        return self._status.status(caller)

    def _measure(self) -> WorkerStatus:
        stats = self._engine.stats
        return WorkerStatus(
            running=self._usage.running,
            kv_blocks_used=round(self._engine.info.kv_blocks * stats.kv_usage),
            staging_bytes_used=self._arena.used - self._arena.evictable,
            staging_bytes_fit=self._arena.fit,
            open_handles=self._handles.open_handles if self._handles is not None else self._arena.regions,
            preemptions=stats.preemptions,
            stalled_seconds=self._engine_watch.stalled_seconds,
            tiers=self._adapters.totals() if self._adapters is not None else TierTotals(),
        )

    def _add_services(self, settings: Settings, role: Role, secret: ClusterSecret) -> list[str]:
        descriptor = workers_pb2.DESCRIPTOR.services_by_name
        workers_pb2_grpc.add_WorkerStatusServicer_to_server(self._status, self._server)  # type: ignore[no-untyped-call]
        names = [health.SERVICE_NAME, descriptor["WorkerStatus"].full_name]
        adapters = self._adapters
        if adapters is not None:
            workers_pb2_grpc.add_WorkerAdaptersServicer_to_server(_Adapters(adapters), self._server)  # type: ignore[no-untyped-call]
            names.append(descriptor["WorkerAdapters"].full_name)
        if self._disk is not None:
            add_AdapterContentServicer_to_server(ContentService(self._disk.folders), self._server)  # type: ignore[no-untyped-call]
            names.append(adapter_content_pb2.DESCRIPTOR.services_by_name["AdapterContent"].full_name)
        parts = Parts(
            engine=self._engine,
            arena=self._arena,
            adapters=adapters,
            sender=self._sender,
            usage=self._usage,
            fingerprint=self._record.fingerprint,
            secret=secret,
            transfer_timeout=settings.router.transfer_timeout,
        )
        served = ROLES[role](self._server, parts)
        self._handles = served.handles
        names += served.names
        servicer = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(servicer, self._server)
        servicer._server_status.update(dict.fromkeys(["", *names], health_pb2.HealthCheckResponse.SERVING))
        return names

    async def _register(self) -> None:
        """Registers the worker, or renews its registration. Brings it back if the store has lost it."""
        self._is_registered = False
        await self._store.put_worker(self._record, LIFETIME)
        self._is_registered = True

    def _until_renewal(self) -> float:
        return RENEWAL_SECONDS if self._is_registered else RETRY_SECONDS


def _warn_of_little_room(role: Role, capacity: int, info: EngineInfo) -> None:
    room = capacity // info.block_bytes * info.block_size
    if room < min(info.max_model_len, info.kv_blocks * info.block_size):
        logger.warning("%s.staging_bytes: prompts of more than %d tokens don't fit in, and are refused", role, room)


class _Adapters(workers_pb2_grpc.WorkerAdaptersServicer):
    def __init__(self, adapters: AdapterStore) -> None:
        self._adapters = adapters

    async def Prefetch(
        self, request: common_pb2.AdapterRef, context: grpc.aio.ServicerContext
    ) -> workers_pb2.PrefetchReply:
        async with errors_reported(context):
            await self._adapters.prefetch(adapter_from_proto(request))
        return workers_pb2.PrefetchReply()


class StartEngine:
    """Starts a worker's engine: `VllmEngine.start`, or a fake in tests."""

    async def __call__(self, settings: Settings, role: Role, arena: str, adapter_arena: str) -> Engine:
        engine = await asyncio.to_thread(_vllm_engine)  # takes seconds, in which signals must be heard
        return await engine.start(settings, role, arena, adapter_arena)


def _vllm_engine() -> type[VllmEngine]:
    from preft.engine.vllm_engine import VllmEngine

    return VllmEngine
