"""A gateway's `AdapterContent` server: workers of other machines read this machine's folders and uploads from it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc.aio

from preft.adapters.catalog.adapter_catalog import Catalog
from preft.adapters.sources.content_service import ContentService
from preft.core.errors import ConfigError
from preft.core.settings import Settings
from preft.rpc.adapter_content_pb2_grpc import add_AdapterContentServicer_to_server
from preft.rpc.readable import ReadableMessages
from preft.rpc.secret import ClusterSecret, OnlyTheCluster
from preft.rpc.server_options import WORKER_SERVER_OPTIONS
from preft.state import local_address


@asynccontextmanager
async def serve_content(settings: Settings, secret: ClusterSecret, catalog: Catalog) -> AsyncIterator[str]:
    """Serves within the context, at the yielded `host:port`.

    Without the setting `state`, all workers are on this machine: nothing is served, and the address is empty. Raises
    ConfigError if `peer_host` isn't an address of this machine, or needs `tls`.
    """
    if settings.state is None:
        yield ""
        return
    host = settings.peer_host
    if host is None:
        host = await asyncio.to_thread(local_address, settings.state.get_secret_value())
    settings.check_internal_host(host)
    guard = OnlyTheCluster(secret)
    server = grpc.aio.server(options=WORKER_SERVER_OPTIONS, interceptors=[guard, ReadableMessages()])
    add_AdapterContentServicer_to_server(ContentService(catalog.folders), server)  # type: ignore[no-untyped-call]
    try:
        address = guard.listen(server, host)
    except RuntimeError as error:
        raise ConfigError(f"peer_host: can't listen on {host}: name an address of this machine") from error
    await server.start()
    try:
        yield address
    finally:
        await server.stop(0)
