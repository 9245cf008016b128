"""The real HTTP and gRPC doors of a gateway over a scripted generator, in a thread of the test or in a process.

`python -m support.sdk_gateway SECONDS` serves until it is killed; SECONDS pass before each token.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import grpc.aio
import uvicorn

from preft.core.request import FinishReason, GenerateRequest
from preft.gateway.deps import GatewayDeps
from preft.gateway.grpc.adapters import AdaptersService
from preft.gateway.grpc.inference import InferenceService
from preft.gateway.grpc.server import serve_grpc
from preft.gateway.http.app import create_app
from preft.gateway.text.parsing import Parsers
from preft.gateway.text.tokenizer import Tokenizer
from preft.rpc import adapters_pb2_grpc, inference_pb2_grpc
from support import small_tokenizers
from support.fakes import FakeCatalog, FakeGenerator, Script

T = TypeVar("T")

TOKENS = 400
LIMIT = 1000  # tokens of the model's context
IDS = tuple(range(30, 30 + 26))
ENDLESS = tuple(IDS[number % len(IDS)] for number in range(TOKENS))


@dataclass
class ScriptedGateway:
    """`scripts` are the answers to the next requests; the last one stays. `urls` holds both doors' addresses."""

    urls: dict[str, str]
    generator: FakeGenerator
    catalog: FakeCatalog
    deps: GatewayDeps
    loop: asyncio.AbstractEventLoop
    scripts: list[Script] = field(default_factory=list)
    authorizations: list[str] = field(default_factory=list)  # as HTTP requests showed them

    def next_script(self, request: GenerateRequest) -> Script:
        return self.scripts.pop(0) if len(self.scripts) > 1 else self.scripts[0]

    def say(self, *texts: str) -> None:
        """Answers the next requests with these texts, token by token, each with an EOS."""
        encode, [eos, *_] = self.deps.tokenizer._backend.encode, self.deps.tokenizer.eos_token_ids
        self.scripts[:] = [Script([*encode(text, add_special_tokens=False).ids, eos]) for text in texts]

    def reset(self) -> None:
        """Forgets all requests and adapters, and answers with a short text from now on."""
        self.scripts[:] = [Script(IDS[:5], finish=FinishReason.LENGTH)]
        for record in (self.generator.requests, self.generator.entered, self.generator.left, self.generator.cancelled):
            record.clear()
        self.catalog.__init__()  # type: ignore[misc]
        self.authorizations.clear()

    def call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(60)


@asynccontextmanager
async def scripted_gateway(
    model: Path, tls: dict[str, str] | None = None, *, parsers: Parsers | None = None
) -> AsyncIterator[ScriptedGateway]:
    """Serves on free ports. `tls`: files ca, cert, key; clients need a certificate too."""
    generator, catalog = FakeGenerator(lambda request: Script()), FakeCatalog()
    tokenizer = await asyncio.to_thread(Tokenizer.load, model)
    deps = GatewayDeps("base", tokenizer, LIMIT, generator, catalog, parsers=parsers)
    gateway = ScriptedGateway({}, generator, catalog, deps, asyncio.get_running_loop())
    generator.script = gateway.next_script
    gateway.reset()
    options: dict[str, Any] = {}
    if tls is not None:
        options = {
            "ssl_certfile": tls["cert"],
            "ssl_keyfile": tls["key"],
            "ssl_ca_certs": tls["ca"],
            "ssl_cert_reqs": 2,
        }
    app = _Recorded(create_app(deps), gateway.authorizations)
    config = uvicorn.Config(app, port=0, log_level="critical", http="httptools", ws="none", lifespan="off", **options)
    server = uvicorn.Server(config)
    server.capture_signals = _no_signals  # type: ignore[method-assign]
    task = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    rpc, rpc_port = await (_secure_rpc(deps, tls) if tls is not None else _rpc(deps))
    secure = "s" if tls is not None else ""
    gateway.urls.update(http=f"http{secure}://127.0.0.1:{port}", grpc=f"grpc{secure}://127.0.0.1:{rpc_port}")
    try:
        yield gateway
    finally:
        await rpc.stop(0)
        server.force_exit = server.should_exit = True
        await task


@contextmanager
def gateway_in_thread(
    model: Path, tls: dict[str, str] | None = None, *, parsers: Parsers | None = None
) -> Iterator[ScriptedGateway]:
    """`scripted_gateway` with an event loop of its own."""
    started: Future[ScriptedGateway] = Future()
    stop: Future[Callable[[], None]] = Future()

    async def serve() -> None:
        event = asyncio.Event()
        loop = asyncio.get_running_loop()
        stop.set_result(lambda: loop.call_soon_threadsafe(event.set))  # type: ignore[arg-type,return-value]
        try:
            async with scripted_gateway(model, tls, parsers=parsers) as gateway:
                started.set_result(gateway)
                await event.wait()
        except BaseException as error:
            if not started.done():
                started.set_exception(error)
            raise

    thread = threading.Thread(target=asyncio.run, args=(serve(),), name="gateway")
    thread.start()
    try:
        yield started.result(60)
    finally:
        stop.result(60)()
        thread.join()


@dataclass(frozen=True)
class _Recorded:
    app: Any
    authorizations: list[str]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        shown = [value.decode() for name, value in scope.get("headers", ()) if name == b"authorization"]
        self.authorizations.extend(shown)
        await self.app(scope, receive, send)


@contextmanager
def _no_signals() -> Iterator[None]:
    yield


async def _rpc(deps: GatewayDeps) -> tuple[Any, int]:
    server = await serve_grpc(deps, "127.0.0.1", 0)
    return server.server, server.port


async def _secure_rpc(deps: GatewayDeps, tls: dict[str, str]) -> tuple[Any, int]:
    """The services behind TLS, as a proxy would put them."""
    server = grpc.aio.server()
    inference_pb2_grpc.add_InferenceServicer_to_server(InferenceService(deps), server)  # type: ignore[no-untyped-call]
    adapters_pb2_grpc.add_AdaptersServicer_to_server(AdaptersService(deps), server)  # type: ignore[no-untyped-call]
    port = server.add_secure_port("127.0.0.1:0", _credentials(tls))
    await server.start()
    return server, port


def _credentials(tls: dict[str, str]) -> Any:
    ca, cert, key = (Path(tls[name]).read_bytes() for name in ("ca", "cert", "key"))
    return grpc.ssl_server_credentials([(key, cert)], ca, require_client_auth=True)


async def _serve_for_ever(seconds: float) -> None:
    with tempfile.TemporaryDirectory() as folder:
        model = await asyncio.to_thread(small_tokenizers.byte_level, Path(folder))
        async with scripted_gateway(model) as gateway:
            gateway.scripts[:] = [Script(ENDLESS, delay=seconds)]
            print(f"serving {gateway.urls['http']} {gateway.urls['grpc']}", flush=True)
            await asyncio.Event().wait()


def main(arguments: Sequence[str]) -> None:
    asyncio.run(_serve_for_ever(float(arguments[0])))


if __name__ == "__main__":
    main(sys.argv[1:])
