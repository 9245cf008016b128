"""Processes that serve adapter content, as gateways and workers do, and with faults on demand."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import grpc.aio

from preft.adapters.sources.content_service import ContentService
from preft.adapters.sources.source import AdapterSource, open_source
from preft.rpc import adapter_content_pb2
from preft.rpc.adapter_content_pb2_grpc import add_AdapterContentServicer_to_server
from preft.rpc.secret import ClusterSecret, OnlyTheCluster
from preft.rpc.server_options import WORKER_SERVER_OPTIONS

SECRET = ClusterSecret("of these tests alone")


class FaultyContent(ContentService):
    """Serves `paths` under every digest. `fault` happens to each file after the first `healthy` bytes."""

    def __init__(self, *paths: Path, fault: str = "", healthy: int = 0) -> None:
        super().__init__(self._all)
        self.paths = paths
        self.finds = 0
        self.reads: list[str] = []
        self._fault = fault
        self._healthy = healthy
        self.server: grpc.aio.Server | None = None
        self.end: asyncio.Task[None] | None = None

    def _all(self, digest: str) -> Sequence[AdapterSource]:
        return [open_source(str(path)) for path in self.paths]

    async def Find(
        self, request: adapter_content_pb2.FindContent, context: grpc.aio.ServicerContext
    ) -> adapter_content_pb2.FoundContent:
        self.finds += 1
        return await super().Find(request, context)

    async def Read(
        self, request: adapter_content_pb2.ReadContent, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[adapter_content_pb2.ContentChunk]:
        self.reads.append(request.file)
        sent = 0
        async for chunk in super().Read(request, context):
            if not self._fault:
                yield chunk
                continue
            yield adapter_content_pb2.ContentChunk(content=chunk.content[: self._healthy - sent])
            sent += min(len(chunk.content), self._healthy - sent)
            if sent < self._healthy:
                continue
            if self._fault == "dies":
                assert self.server is not None
                self.end = asyncio.create_task(self.server.stop(None))  # also ends this call
                await asyncio.sleep(3600)
            elif self._fault == "breaks off":
                return
            elif self._fault == "falls silent":
                await asyncio.sleep(3600)
            else:
                assert self._fault == "dribbles"
                while True:
                    yield adapter_content_pb2.ContentChunk(content=b"x")
                    await asyncio.sleep(0.05)


@asynccontextmanager
async def serving(service: ContentService, secret: ClusterSecret = SECRET) -> AsyncIterator[str]:
    """The address of a server of `service`, which only callers with `secret` may use."""
    guard = OnlyTheCluster(secret)
    server = grpc.aio.server(options=WORKER_SERVER_OPTIONS, interceptors=[guard])
    add_AdapterContentServicer_to_server(service, server)
    address = guard.listen(server, "127.0.0.1")
    if isinstance(service, FaultyContent):
        service.server = server
    await server.start()
    try:
        yield address
    finally:
        await (service.end if isinstance(service, FaultyContent) and service.end else server.stop(None))
