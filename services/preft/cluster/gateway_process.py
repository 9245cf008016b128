"""The gateway process: router, HTTP server and gRPC server over a given catalog, wired together and ended in order.

Doesn't start workers. The router finds them in the state store.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from http import HTTPStatus

import uvicorn
from prometheus_client import CollectorRegistry
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from preft.adapters.catalog.adapter_catalog import Catalog
from preft.cluster.access import open_access
from preft.cluster.adapters import uploads_folder
from preft.cluster.process import listen_on
from preft.core.errors import ConfigError
from preft.core.ports import StateStore
from preft.core.settings import MiB, Settings, host_and_port
from preft.gateway.deps import GatewayDeps
from preft.gateway.drain import Drain
from preft.gateway.grpc.server import serve_grpc
from preft.gateway.http.app import create_app
from preft.gateway.http.errors import error_code, plain_error
from preft.gateway.text.parsing import Parsers
from preft.gateway.text.tokenizer import Tokenizer
from preft.router.router import Router
from preft.rpc.secret import ClusterSecret

logger = logging.getLogger(__name__)

SHUTDOWN_SECONDS = 5  # for the last bytes of replies after the last request's end
KEEP_ALIVE_SECONDS = 75  # longer than clients keep idle connections, so that no request meets a closing connection
MAX_HEADER_BYTES = 64 << 10  # of request line and headers together; one read may exceed the limit
TOKEN_BYTES = 64  # of a request body, for each token of the context; a token id needs 7
MIN_BODY_BYTES, MAX_BODY_BYTES = 4 * MiB, 32 * MiB


@dataclass(frozen=True, slots=True)
class RunningGateway:
    """`address` is HTTP's `host:port`. `server` runs until its `should_exit` is set."""

    address: str
    server: uvicorn.Server
    task: asyncio.Task[None]
    router: Router
    catalog: Catalog
    requests: Drain
    is_chat: bool  # whether the model has a chat template

    async def drain(self, seconds: float, at_once: asyncio.Event) -> None:
        """Refuses new requests, waits for running ones up to `seconds` or until `at_once`, and ends the HTTP server.

        Requests that still run then end with an error. Returns early if the HTTP server has died.
        """
        self.requests.begin()
        idle = asyncio.create_task(self.requests.wait_idle())
        hurry = asyncio.create_task(at_once.wait())
        try:
            await asyncio.wait({idle, hurry, self.task}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            self.requests.interrupt()
            await asyncio.wait({idle, self.task}, timeout=SHUTDOWN_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        finally:
            idle.cancel()
            hurry.cancel()
        self.server.should_exit = True
        await self.task


def body_limit(max_model_len: int) -> int:
    """The most bytes of a request body: enough for several prompts that fill the context.

    Parsing holds up all other requests, for 25 ms of CPU time per megabyte of token ids.
    """
    return min(max(TOKEN_BYTES * max_model_len, MIN_BODY_BYTES), MAX_BODY_BYTES)


def load_parsers(settings: Settings) -> Parsers | None:
    """The parsers that the settings name. Imports vLLM only if they name any. Raises ConfigError."""
    tools, reasoning = settings.tool_call_parser, settings.reasoning_parser
    if tools is None and reasoning is None:
        return None
    try:
        from preft.engine.chat_parsers import VllmParsers
    except ImportError as error:
        key = "tool_call_parser" if tools is not None else "reasoning_parser"
        raise ConfigError(f"{key}: gateways with parsers need vLLM, which can't be imported: {error}") from error
    return VllmParsers(settings.model, tools, reasoning)


@asynccontextmanager
async def run_gateway(
    settings: Settings,
    secret: ClusterSecret,
    store: StateStore,
    catalog: Catalog,
    cluster_id: str,
    content_address: str,
) -> AsyncIterator[RunningGateway]:
    """Serves within the context. `settings.max_model_len` must be set. Raises ConfigError if a port is taken, or as
    `open_access`.

    Workers are told of the AdapterContent service at `content_address`.
    """
    assert settings.max_model_len is not None
    tokenizer = await asyncio.to_thread(Tokenizer.load, settings.model)
    parsers = await asyncio.to_thread(load_parsers, settings)
    listener = listen_on(settings.host, settings.port)
    router = Router(store, settings.router, secret, cluster_id=cluster_id, content_address=content_address)
    registry = CollectorRegistry()
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(listener.close)
        opened = await stack.enter_async_context(open_access(settings, catalog, registry))
        deps = GatewayDeps(
            model_name=settings.model_name,
            tokenizer=tokenizer,
            max_model_len=settings.max_model_len,
            max_body_bytes=body_limit(settings.max_model_len),
            generator=router,
            catalog=catalog,
            registry=registry,
            places=router.places,
            workers=router.workers,
            stats=router.stats,
            catalog_age=lambda: catalog.age,
            model_root=str(settings.model),
            max_adapter_bytes=settings.store.max_adapter_bytes,
            upload_folder=uploads_folder(settings),
            allowed_hosts=(settings.host, listener.getsockname()[0], *settings.allowed_hosts),
            allowed_origins=tuple(settings.allowed_origins),
            roles=settings.roles,
            access=opened.access,
            accounts=opened.accounts,
            parsers=parsers,
        )
        config = uvicorn.Config(
            create_app(deps),
            log_level="warning",
            access_log=False,
            lifespan="off",
            timeout_graceful_shutdown=SHUTDOWN_SECONDS,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            http=_LimitedHeaders,
        )
        server = _Server(config)
        await router.start()
        stack.push_async_callback(router.close)
        if settings.grpc_port is not None:
            grpc_server = await serve_grpc(deps, settings.host, settings.grpc_port)
            stack.push_async_callback(grpc_server.stop)
        task = asyncio.create_task(server.serve(sockets=[listener]), name="http")
        address = host_and_port(*listener.getsockname()[:2])
        try:
            yield RunningGateway(address, server, task, router, catalog, deps.drain, tokenizer.chat_prompt is not None)
        finally:
            server.should_exit = True
            await task


class _LimitedHeaders(HttpToolsProtocol):
    """Ends connections with more than `MAX_HEADER_BYTES` of headers or trailers: uvicorn would store them all."""

    _pending = 0  # since the last end of headers or piece of a body

    def data_received(self, data: bytes) -> None:
        self._pending += len(data)
        super().data_received(data)
        if self._pending > MAX_HEADER_BYTES and not self.transport.is_closing():
            if self.cycle is None or self.cycle.response_complete:
                message = f"The request's headers are larger than {MAX_HEADER_BYTES} bytes."
                self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, message)
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        self._refuse(HTTPStatus.BAD_REQUEST, msg)

    def _refuse(self, status: HTTPStatus, message: str) -> None:
        """Answers malformed requests, which no route sees, with the usual error body."""
        body = plain_error(status, message, error_code(status)).body
        head = b"content-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(body)
        self.transport.write(STATUS_LINE[status] + head + body)
        self.transport.close()

    def on_headers_complete(self) -> None:
        self._pending = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._pending = 0
        super().on_body(body)


class _Server(uvicorn.Server):
    """Leaves signals to `preft serve`."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
