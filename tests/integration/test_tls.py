"""Calls between the processes of a cluster over TLS: who gets in, what arrives, and what a new certificate changes."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from preft.cluster.console import Console
from preft.cluster.content_server import serve_content
from preft.cluster.gateway_process import RunningGateway
from preft.cluster.model import with_model_length
from preft.cluster.process import Stop
from preft.cluster.secret import cluster_secret
from preft.cluster.serving import open_gateway
from preft.cluster.stores import open_registrations
from preft.cluster.worker_process import worker_setup
from preft.core.cluster import Role
from preft.core.errors import ConfigError, TransferFailed
from preft.core.request import KvHeader, Sampling
from preft.core.settings import Settings, TlsSettings
from preft.rpc import tls
from preft.rpc.secret import ClusterChannel, ClusterSecret, OnlyTheCluster
from preft.rpc.tls import NAME
from preft.transfer.grpc_push import METHOD, GrpcKvSender
from preft.transfer.port import checksum_of, hash_prompt
from preft.worker.server import WorkerServer
from support.certificates import Authority
from support.fake_engine import tokens_of
from support.fakes import FakeStore
from support.lora_folders import write_lora
from support.small_tokenizers import byte_level
from support.worker_servers import StartFake, StartPaced, settings_for, start
from support.worker_services import until

SECRET = "of these tests alone"
PROMPT = [5, 6, 7, 8, 9]


@pytest.fixture
def authority() -> Authority:
    return Authority()


@pytest.fixture(autouse=True)
def _looks_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tls, "LOOK_SECONDS", 0.0)


@pytest.fixture
def settings(tmp_path: Path, authority: Authority) -> Settings:
    byte_level(tmp_path / "base")
    shared = {"state": str(tmp_path / "shared.sqlite"), "port": 0, "max_model_len": 128}
    return with_model_length(settings_for(tmp_path, tls=authority.issue(tmp_path / "tls"), **shared))


@pytest.fixture
async def decode(settings: Settings) -> AsyncIterator[WorkerServer]:
    worker = await start(Role.DECODE, settings, FakeStore(), StartFake())
    yield worker
    await worker.close()


async def code_of_health(channel: grpc.aio.Channel) -> grpc.StatusCode:
    """How a call ends that needs no secret."""
    try:
        await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


def channel_of(address: str, files: dict[str, str] | None, ca: bytes) -> grpc.aio.Channel:
    """A stranger's channel, with these files or without a certificate."""
    own = [Path(files[name]).read_bytes() for name in ("key", "cert")] if files else [None, None]
    options = [("grpc.ssl_target_name_override", NAME)]
    return grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(ca, *own), options)


# Who gets in


async def test_callers_without_a_certificate_of_the_authority_reach_no_handler(
    decode: WorkerServer, authority: Authority, tmp_path: Path
) -> None:
    address, other = decode.record.address, Authority("another")
    strangers = {
        "nothing": channel_of(address, None, authority.ca),
        "another authority's": channel_of(address, other.issue(tmp_path / "other"), authority.ca),
        "an expired one": channel_of(address, authority.issue(tmp_path / "old", days=(-2, -1)), authority.ca),
        "plain text": grpc.aio.insecure_channel(address),
        "its own": channel_of(address, authority.issue(tmp_path / "own"), authority.ca),
    }
    ended = {}
    for what, channel in strangers.items():
        async with channel:
            ended[what] = await code_of_health(channel)
    assert ended == dict.fromkeys(strangers, grpc.StatusCode.UNAVAILABLE) | {"its own": grpc.StatusCode.OK}


async def test_a_certificate_without_the_secret_is_not_enough(decode: WorkerServer, settings: Settings) -> None:
    certificates = cluster_secret(settings).certificates
    ended = []
    for secret in (SECRET, "of another cluster"):
        async with ClusterChannel(decode.record.address, ClusterSecret(secret, certificates)) as channel:
            call = channel.unary_stream("/preft.v1.WorkerStatus/Watch")(b"", timeout=5)
            ended.append(await call.code())
    assert ended == [grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.UNAUTHENTICATED]


class Sink(grpc.GenericRpcHandler):
    """Takes KV with a proof that only the cluster's secret makes."""

    def __init__(self) -> None:
        self.got: list[bytes] = []

    def service(self, details: Any) -> Any:
        async def take(frames: AsyncIterator[bytes], context: Any) -> bytes:
            await context.send_initial_metadata((("preft-cluster-proof", ClusterSecret(SECRET).proof("h")),))
            async for frame in frames:
                self.got.append(frame)
            return b""

        return grpc.stream_unary_rpc_method_handler(take) if details.method == METHOD else None


@asynccontextmanager
async def serving(handler: grpc.GenericRpcHandler, secret: ClusterSecret) -> AsyncIterator[str]:
    server, guard = grpc.aio.server(), OnlyTheCluster(secret)
    server.add_generic_rpc_handlers((handler,))
    address = guard.listen(server, "127.0.0.1")
    await server.start()
    try:
        yield address
    finally:
        await server.stop(None)


async def test_kv_goes_to_receivers_with_a_certificate_of_the_authority_alone(
    settings: Settings, authority: Authority, tmp_path: Path
) -> None:
    secret = cluster_secret(settings)
    payload = random.Random(0).randbytes(5 << 20)
    header = KvHeader("h", "fp", "", 5, len(payload), checksum_of(payload), 1, hash_prompt(PROMPT))
    other = settings.model_copy(update={"tls": None})
    foreign = settings_for(tmp_path, tls=Authority("another").issue(tmp_path / "other"))
    sender = GrpcKvSender(secret)
    try:
        for receiver in (cluster_secret(other), cluster_secret(foreign)):
            sink = Sink()
            async with serving(sink, receiver) as address:
                with pytest.raises(TransferFailed, match=f"the KV push to {address} failed: "):
                    await sender.push(address, header, memoryview(payload), timeout=5)
            assert sink.got == []
        sink = Sink()
        async with serving(sink, secret) as address:
            await sender.push(address, header, memoryview(payload), timeout=10)
        assert b"".join(sink.got) == payload
    finally:
        await sender.close()


# A whole cluster


@asynccontextmanager
async def cluster(settings: Settings, worker_settings: Settings) -> AsyncIterator[RunningGateway]:
    """A gateway and two workers, which are ready."""
    async with AsyncExitStack() as stack:
        store = open_registrations(settings)
        stack.push_async_callback(store.close)
        for role in (Role.PREFILL, Role.DECODE):
            worker = await start(role, worker_settings, store, StartPaced())
            stack.push_async_callback(worker.close)
        gateway = await open_gateway(stack, settings, store, "", Stop(), Console())
        assert gateway is not None
        await until(gateway.router.ready)
        yield gateway


async def streamed(gateway: RunningGateway, model: str, count: int, begun: asyncio.Event | None = None) -> list[int]:
    """The tokens of a streamed reply. Sets `begun` when some are there."""
    body = {"model": model, "prompt": PROMPT, "max_tokens": count, "temperature": 0, "ignore_eos": True}
    body |= {"stream": True, "return_token_ids": True}
    tokens: list[int] = []
    async with (
        httpx.AsyncClient(base_url=f"http://{gateway.address}", trust_env=False, timeout=30) as client,
        client.stream("POST", "/v1/completions", json=body) as reply,
    ):
        assert reply.status_code == 200, await reply.aread()
        async for line in reply.aiter_lines():
            if line.startswith("data: {"):
                event = httpx.Response(200, content=line.removeprefix("data: ")).json()
                assert "error" not in event, event
                tokens += event["choices"][0].get("token_ids") or []
                if begun is not None and len(tokens) > 3:
                    begun.set()
    return tokens


def expected(digest: str, count: int) -> list[int]:
    return tokens_of(digest, PROMPT, Sampling(max_tokens=count, temperature=0.0, ignore_eos=True))


async def test_a_cluster_serves_exact_tokens_and_fetches_adapters_over_tls(settings: Settings, tmp_path: Path) -> None:
    elsewhere = settings.model_copy(update={"state_dir": tmp_path / "elsewhere", "adapter_sources": ()})
    async with cluster(settings, elsewhere) as gateway:
        added = await gateway.catalog.add("ada", str(write_lora(tmp_path / "ada")))
        assert await streamed(gateway, "base", 10) == expected("", 10)
        assert await streamed(gateway, "ada", 10) == expected(added.digest, 10)
    assert (tmp_path / "elsewhere" / "adapters" / added.digest).is_dir(), "the worker has read it from the gateway"


async def test_a_new_certificate_disturbs_no_stream_and_new_connections_use_it(
    settings: Settings, tmp_path: Path
) -> None:
    folder, begun = tmp_path / "tls", asyncio.Event()
    async with cluster(settings, settings) as gateway:
        addresses = [seen.worker.address for seen in gateway.router.workers()]
        running = asyncio.create_task(streamed(gateway, "base", 110, begun))
        await asyncio.wait_for(begun.wait(), 20)
        before = [await asyncio.to_thread(shown_by, address, folder) for address in addresses]
        Authority("the next one").issue(folder)  # no file of before is good any more
        after = [await asyncio.to_thread(shown_by, address, folder) for address in addresses]
        assert not running.done()
        assert after == [certificate_in(folder)] * 2 != before
        assert await streamed(gateway, "base", 5) == expected("", 5)
        assert await running == expected("", 110)
        assert [seen.state.value for seen in gateway.router.workers()] == ["ready", "ready"]


def certificate_in(folder: Path) -> bytes:
    return ssl.PEM_cert_to_DER_cert((folder / "cert.pem").read_text())


def shown_by(address: str, folder: Path) -> bytes:
    """The certificate that a server shows to a new connection."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.set_alpn_protocols(["h2"])
    context.load_verify_locations(folder / "ca.pem")
    context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), 10) as raw, context.wrap_socket(raw, server_hostname=NAME) as sock:
        shown = sock.getpeercert(binary_form=True)
        assert shown is not None
        return shown


class Mirror(grpc.GenericRpcHandler):
    """Answers each message with the caller's certificate."""

    def service(self, details: Any) -> Any:
        async def answer(messages: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
            async for _ in messages:
                yield context.auth_context()["x509_pem_cert"][0]

        return grpc.stream_stream_rpc_method_handler(answer)


async def test_a_channel_moves_to_the_new_certificate_and_its_running_calls_stay(
    settings: Settings, authority: Authority
) -> None:
    secret = cluster_secret(settings)
    assert settings.tls is not None
    async with serving(Mirror(), secret) as address, ClusterChannel(address, secret) as channel:
        method, before = channel.stream_stream("/any/Method"), open_sockets()
        old = settings.tls.cert.read_bytes()
        running = method(timeout=20)
        for _ in range(2):
            await running.write(b"?")
            assert await running.read() == old
        authority.issue(settings.tls.cert.parent)
        new = settings.tls.cert.read_bytes()
        for _ in range(3):
            later = method(timeout=20)
            await later.write(b"?")
            assert await later.read() == new
            await running.write(b"?")
            assert await running.read() == old
            await later.done_writing()
            assert await later.code() is grpc.StatusCode.OK
        await running.done_writing()
        assert await running.read() is grpc.aio.EOF
        assert await running.code() is grpc.StatusCode.OK
        del running
        await until(lambda: open_sockets() == before + 2)  # both ends of one connection


def open_sockets() -> int:
    return sum(
        os.path.realpath(f"/proc/self/fd/{number}").find("socket:") >= 0 for number in os.listdir("/proc/self/fd")
    )


# Without TLS


async def test_a_worker_without_tls_is_named_and_gets_no_requests(
    settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "preft")
    plain = settings.model_copy(update={"tls": None})
    async with AsyncExitStack() as stack:
        store = open_registrations(settings)
        stack.push_async_callback(store.close)
        for role, own in ((Role.PREFILL, settings), (Role.DECODE, plain)):
            worker = await start(role, own, store, StartFake())
            stack.push_async_callback(worker.close)
        gateway = await open_gateway(stack, settings, store, "", Stop(), Console())
        assert gateway is not None
        await until(lambda: [seen.state.value for seen in gateway.router.workers()] == ["dead", "ready"])
        [said] = [record.getMessage() for record in caplog.records]
        assert said.startswith("worker decode gets no requests: worker decode: ")
        assert "Tls handshake failed" in said


async def test_a_gateway_has_one_reader_of_its_files(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bad certificate brings one warning, though the gateway calls workers and is called by them."""
    readers = []

    class Counted(tls.Certificates):
        def __init__(self, files: TlsSettings) -> None:
            super().__init__(files)
            readers.append(self)

    monkeypatch.setattr("preft.cluster.secret.Certificates", Counted)
    async with AsyncExitStack() as stack:
        assert await open_gateway(stack, settings, FakeStore(), "", Stop(), Console()) is not None
    assert len(readers) == 1


async def test_a_port_that_others_reach_needs_tls(tmp_path: Path) -> None:
    state = {"state": str(tmp_path / "shared.sqlite"), "peer_host": "10.1.2.3"}
    store, engines, settings = FakeStore(), StartFake(), settings_for(tmp_path, **state)
    says = r"^tls: other machines reach 10\.1\.2\.3, .*: set tls, or insecure: true "
    with pytest.raises(ConfigError, match=says):
        await WorkerServer.start(worker_setup(settings, Role.DECODE), "d", "10.1.2.3", store, engines)
    assert (engines.arenas, await store.workers()) == ([], [])
    with pytest.raises(ConfigError, match=says):
        async with serve_content(settings, cluster_secret(settings), None):  # type: ignore[arg-type]
            pass


async def test_tls_with_unusable_files_starts_nothing(tmp_path: Path, authority: Authority) -> None:
    files = authority.issue(tmp_path / "tls", days=(-2, -1))
    with pytest.raises(ConfigError, match=r"^tls\.cert: .*expired"):
        await start(Role.DECODE, settings_for(tmp_path, tls=files), FakeStore(), StartFake())
