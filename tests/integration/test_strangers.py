"""Connections and calls that would hold a worker's memory or somebody else's KV: all end, and the worker serves on."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import grpc
import grpc.aio
import pytest

from preft.core.cluster import Role
from preft.core.errors import PreftError, TransferFailed
from preft.core.request import KvHeader, Sampling
from preft.core.settings import Settings
from preft.router.decode_stream import DecodeStream
from preft.rpc import workers_pb2, workers_pb2_grpc
from preft.rpc.convert import sampling_to_proto
from preft.rpc.secret import ClusterChannel
from preft.rpc.server_options import HANDSHAKE_MS
from preft.transfer.grpc_push import GrpcKvSender
from preft.transfer.port import checksum_of, hash_prompt
from preft.transfer.seal import SEAL, write_seal
from preft.worker.server import WorkerServer
from support.certificates import Authority
from support.fake_engine import kv_of, tokens_of
from support.fakes import FakeStore
from support.worker_servers import SECRET, StartFake, settings_for, start
from support.worker_services import rest, until

PROMPT = (5, 6, 7, 8, 9)
DIGEST, OTHER = "a1" * 32, "b2" * 32
GREEDY = Sampling(max_tokens=6, temperature=0.0)
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
CLIENT_HELLO = bytes.fromhex("16030102000100 01fc0303")  # the first bytes of a TLS handshake


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return settings_for(tmp_path)


@pytest.fixture
async def worker(settings: Settings) -> AsyncIterator[WorkerServer]:
    """A decode worker. Checks at the end that nothing is left in it."""
    worker = await start(Role.DECODE, settings, FakeStore(), StartFake())
    yield worker
    await until(lambda: is_idle(worker))
    await worker.close()


def is_idle(worker: WorkerServer) -> bool:
    status = worker.status()
    return (status.running, status.open_handles, status.staging_bytes_used) == (0, 0, 0)


async def push(worker: WorkerServer, handle: str, digest: str, uses: int = 1) -> None:
    payload = bytearray(kv_of(digest, PROMPT) + bytes(SEAL.size))
    write_seal(memoryview(payload), len(PROMPT))
    header = KvHeader(
        handle,
        worker.record.fingerprint,
        digest,
        len(PROMPT),
        len(payload),
        checksum_of(payload),
        uses,
        hash_prompt(PROMPT),
    )
    sender = GrpcKvSender(SECRET)
    try:
        await sender.push(worker.record.address, header, memoryview(payload), timeout=10)
    finally:
        await sender.close()


@asynccontextmanager
async def stream_to(worker: WorkerServer) -> AsyncIterator[DecodeStream]:
    async with ClusterChannel(worker.record.address, SECRET) as channel:
        stream = DecodeStream(workers_pb2_grpc.DecodeWorkerStub(channel), worker.record.id, lambda: None)
        yield stream
        await stream.close()


async def continued(stream: DecodeStream, handle: str, digest: str, seconds: float = 1.0) -> list[int]:
    """The tokens after the prompt's first one."""
    [first, *_] = tokens_of(digest, PROMPT, GREEDY)
    request = workers_pb2.DecodeRequest(
        request_id="r",
        handle=handle,
        prompt_token_ids=PROMPT,
        sampling=sampling_to_proto(GREEDY),
        adapter_digest=digest,
        kv_timeout=seconds,
        choices=[workers_pb2.DecodeChoice(output_token_ids=[first])],
    )
    [call] = stream.start(request, 20)
    return [first, *await rest(call)]


async def test_a_forged_or_replayed_handle_gets_nobody_s_kv(worker: WorkerServer) -> None:
    async with stream_to(worker) as stream:
        await push(worker, "h", DIGEST)
        for handle, digest in (("guessed", DIGEST), ("h", OTHER), ("h", ""), ("", DIGEST), ("h\0", DIGEST)):
            with pytest.raises(PreftError):
                await continued(stream, handle, digest, 0.1)
        with pytest.raises(TransferFailed):  # a second push under the name would change what the owner gets
            await push(worker, "h", OTHER)
        assert await continued(stream, "h", DIGEST) == tokens_of(DIGEST, PROMPT, GREEDY)
        with pytest.raises(TransferFailed):
            await continued(stream, "h", DIGEST, 0.1)
        with pytest.raises(TransferFailed):  # a recorded push, sent again
            await push(worker, "h", DIGEST)


@pytest.mark.parametrize("with_secret", [False, True])
async def test_oversized_metadata_is_refused(worker: WorkerServer, with_secret: bool) -> None:
    metadata = (("preft-kv-header-bin", os.urandom(200_000)), *((f"x-{number}", "y" * 1000) for number in range(100)))
    address = worker.record.address
    channel = ClusterChannel(address, SECRET) if with_secret else grpc.aio.insecure_channel(address)
    async with channel:
        for method in ("/preft.v1.KvTransfer/Push", "/preft.v1.DecodeWorker/Decode", "/grpc.health.v1.Health/Check"):
            call = channel.stream_stream(method)(metadata=metadata, timeout=10)
            assert await call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    await serves(worker)


async def test_connections_that_never_finish_are_closed(worker: WorkerServer, tmp_path: Path) -> None:
    files = Authority().issue(tmp_path / "tls")
    encrypted = await start(Role.DECODE, settings_for(tmp_path, tls=files), FakeStore(), StartFake(), "encrypted")
    before = open_files()
    starts = [b"", b"P", PREFACE[:20], PREFACE, CLIENT_HELLO, b"GET / HTTP/1.1\r\n", bytes(100)] * 20
    connections = []
    for begun in starts:
        for each in (worker, encrypted):
            reader, writer = await asyncio.open_connection("127.0.0.1", int(each.record.address.rpartition(":")[2]))
            writer.write(begun)
            connections.append((reader, writer))
    assert open_files() >= before + len(connections)
    await serves(worker)
    async with asyncio.timeout(HANDSHAKE_MS / 1000 + 20):
        for reader, writer in connections:
            with suppress(ConnectionError):
                while await reader.read(1000):
                    pass
            writer.close()
    await serves(worker)
    await until(lambda: open_files() <= before + 3)
    await encrypted.close()


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


async def serves(worker: WorkerServer) -> None:
    """Fails unless the worker works."""
    handle = os.urandom(8).hex()
    await push(worker, handle, DIGEST)
    async with stream_to(worker) as stream:
        assert await continued(stream, handle, DIGEST) == tokens_of(DIGEST, PROMPT, GREEDY)
