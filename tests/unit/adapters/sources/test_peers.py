"""Adapters from other processes of the cluster: whole and in time, or refused."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import grpc
import grpc.aio
import pytest

from preft.adapters.formats.digest import CONFIG_FILE, WEIGHTS_FILE
from preft.adapters.sources.content_service import ContentService
from preft.adapters.sources.limits import SourceLimits
from preft.adapters.sources.peers import Peers
from preft.adapters.sources.source import AdapterSource, open_source
from preft.adapters.store.disk_tier import DiskTier
from preft.core.errors import PreftError, Unavailable
from preft.core.settings import MiB
from preft.rpc import adapter_content_pb2
from preft.rpc.adapter_content_pb2_grpc import AdapterContentStub
from preft.rpc.secret import ClusterChannel, ClusterSecret
from support.content_peers import SECRET, FaultyContent, serving
from support.worker_services import broken, code_of

DIGEST = "0" * 64
WEIGHTS = os.urandom(3 * MiB + 5)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / CONFIG_FILE).write_bytes(b"{}")
    (folder / WEIGHTS_FILE).write_bytes(WEIGHTS)
    return folder


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


def peers_at(*workers: str, timeout: float = 20.0, min_rate: int = 64 << 10) -> Peers:
    async def others() -> list[str]:
        return list(workers)

    return Peers(SECRET, SourceLimits(timeout, min_rate), others)


async def found(peers: Peers, stop: threading.Event | None = None) -> list[AdapterSource]:
    return [source async for source in peers.find(DIGEST, stop or threading.Event())]


async def content(source: AdapterSource) -> dict[str, bytes]:
    """All bytes, read in a thread as a fetch does."""
    return await asyncio.to_thread(lambda: {name: b"".join(source.read(name)) for name in source.files()})


async def test_reads_what_a_peer_has(adapter: Path, stack: AsyncExitStack) -> None:
    address = await stack.enter_async_context(serving(FaultyContent(adapter)))
    [source] = await found(peers_at(address))
    assert source.place == f"preft://{address}"
    assert source.files() == {CONFIG_FILE: 2, WEIGHTS_FILE: len(WEIGHTS)}
    assert await content(source) == {CONFIG_FILE: b"{}", WEIGHTS_FILE: WEIGHTS}


async def test_gateways_are_asked_before_workers_and_while_the_store_is_away(
    adapter: Path, stack: AsyncExitStack
) -> None:
    gateway, worker = FaultyContent(adapter), FaultyContent(adapter)
    at = [await stack.enter_async_context(serving(service)) for service in (gateway, worker)]
    peers = peers_at(at[1])
    with peers.gateway(at[0]), peers.gateway(at[0]):
        assert [source.place for source in await found(peers)] == [f"preft://{address}" for address in at]
    assert gateway.finds == 1
    assert [source.place for source in await found(peers)] == [f"preft://{at[1]}"]

    async def unavailable() -> list[str]:
        raise Unavailable("the state store is away")

    peers = Peers(SECRET, SourceLimits(), unavailable)
    with peers.gateway(at[0]):
        assert [source.place for source in await found(peers)] == [f"preft://{at[0]}"]


async def test_peers_without_the_adapter_or_the_secret_or_alive_are_passed_over(
    adapter: Path, tmp_path: Path, stack: AsyncExitStack
) -> None:
    tier = DiskTier(tmp_path / "tier", MiB, MiB)
    at = [
        await stack.enter_async_context(serving(ContentService(tier.folders))),
        await stack.enter_async_context(serving(FaultyContent(tmp_path / "gone"))),
        await stack.enter_async_context(serving(FaultyContent(adapter), ClusterSecret("another cluster's secret"))),
        "127.0.0.1:1",
    ]
    last = await stack.enter_async_context(serving(FaultyContent(tmp_path / "gone", adapter)))
    [source] = await found(peers_at(*at, last))
    assert source.place == f"preft://{last}"
    assert (await content(source))[WEIGHTS_FILE] == WEIGHTS


@pytest.mark.parametrize(
    ("fault", "problem"),
    [
        ("dies", "can't be read from 127.0.0.1"),
        ("falls silent", "don't come in time"),
        ("dribbles", "don't come in time"),
    ],
)
async def test_a_peer_that_fails_in_the_middle(adapter: Path, stack: AsyncExitStack, fault: str, problem: str) -> None:
    service = FaultyContent(adapter, fault=fault, healthy=MiB + 7)
    address = await stack.enter_async_context(serving(service))
    [source] = await found(peers_at(address, timeout=0.3, min_rate=10 * MiB))
    started = time.monotonic()
    with pytest.raises(Unavailable, match=problem):
        await asyncio.to_thread(lambda: list(source.read(WEIGHTS_FILE)))
    assert time.monotonic() < started + 10


async def test_a_copy_that_breaks_off_is_refused_by_its_size(
    adapter: Path, tmp_path: Path, stack: AsyncExitStack
) -> None:
    address = await stack.enter_async_context(serving(FaultyContent(adapter, fault="breaks off", healthy=MiB)))
    [source] = await found(peers_at(address))
    tier = DiskTier(tmp_path / "tier", 8 * MiB, 8 * MiB)
    with pytest.raises(PreftError, match="changed while it was read"):
        await asyncio.to_thread(tier.fetch, source, lambda copy: None)
    assert tier.used() == 0


async def test_a_stopped_read_ends_soon(adapter: Path, stack: AsyncExitStack) -> None:
    address = await stack.enter_async_context(serving(FaultyContent(adapter, fault="falls silent", healthy=7)))
    stop = threading.Event()
    [source] = await found(peers_at(address), stop)
    reading = asyncio.create_task(asyncio.to_thread(lambda: list(source.read(WEIGHTS_FILE))))
    await asyncio.sleep(0.1)
    stop.set()
    with pytest.raises(Unavailable, match="nobody waits for it"):
        await asyncio.wait_for(reading, 10)


async def test_no_request_reads_another_file(adapter: Path, tmp_path: Path, stack: AsyncExitStack) -> None:
    (adapter / "private.txt").write_text("a secret")
    tier = DiskTier(tmp_path / "tier", 8 * MiB, 8 * MiB)
    digest, _ = tier.fetch(open_source(str(adapter)), lambda copy: None)
    address = await stack.enter_async_context(serving(ContentService(tier.folders)))
    async with ClusterChannel(address, SECRET) as channel:
        stub = AdapterContentStub(channel)
        for wrong in ("../adapter", str(adapter), digest.upper(), digest[:-1], ""):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await stub.Find(adapter_content_pb2.FindContent(digest=wrong))
            assert code_of(refused.value) == "invalid_request"
            _, error = await broken(stub.Read(adapter_content_pb2.ReadContent(digest=wrong, file=CONFIG_FILE)))
            assert code_of(error) == "invalid_request"
        for file in ("private.txt", f"../{digest}/{CONFIG_FILE}", str(adapter / "private.txt"), "..", ""):
            _, error = await broken(stub.Read(adapter_content_pb2.ReadContent(digest=digest, file=file)))
            assert code_of(error) == "invalid_request"
        _, error = await broken(stub.Read(adapter_content_pb2.ReadContent(digest=digest, folder=1, file=CONFIG_FILE)))
        assert code_of(error) == "adapter_source_not_found"
    async with grpc.aio.insecure_channel(address) as stranger:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await AdapterContentStub(stranger).Find(adapter_content_pb2.FindContent(digest=digest))
        assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
