"""The HTTP server as it is run: where it listens, and what it takes for a request."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import httpx
import pytest

from preft.cluster.gateway_process import MAX_HEADER_BYTES, RunningGateway, run_gateway
from preft.core.settings import Settings
from support.fake_workers import FakeCluster
from support.fakes import FakeCatalog
from support.small_tokenizers import byte_level

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
MANY = b"x-name: value\r\n" * 100


@asynccontextmanager
async def running(folder: Path, host: str = "127.0.0.1") -> AsyncIterator[RunningGateway]:
    settings = Settings(model=byte_level(folder), host=host, port=0, max_model_len=64)
    async with run_gateway(settings, cast(Any, FakeCluster()), cast(Any, FakeCatalog.of()), "x") as gateway:
        yield gateway


@pytest.fixture
async def gateway(tmp_path: Path) -> AsyncIterator[RunningGateway]:
    async with running(tmp_path) as gateway:
        yield gateway


async def answer(gateway: RunningGateway, start: bytes, part: bytes) -> bytes:
    """What comes back before the connection is closed, after `start` and as many `part` as are just too many."""
    host, port = gateway.address.split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(start)
        await asyncio.sleep(0.05)
        writer.write(part * ((MAX_HEADER_BYTES - len(start)) // len(part)))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reader.readuntil(b"431"), 0.1)  # not yet
        writer.write(part)
        return await asyncio.wait_for(reader.read(), 5)
    finally:
        writer.transport.abort()


@pytest.mark.parametrize(
    ("start", "part"),
    [
        (HEAD, MANY),
        (HEAD + b"x-name: ", b"x" * 4096),
        (b"GET /", b"x" * 4096),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n" + HEAD, MANY),
    ],
    ids=["many", "one", "path", "second request"],
)
async def test_headers_that_never_end_are_refused(gateway: RunningGateway, start: bytes, part: bytes) -> None:
    assert b"HTTP/1.1 431 Request Header Fields Too Large\r\n" in await answer(gateway, start, part)


async def test_trailers_that_never_end_are_refused(gateway: RunningGateway) -> None:
    chunked = HEAD + b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n{\r\n0\r\n"
    assert await answer(gateway, chunked, MANY) == b""  # the request has begun: nothing is mixed into its answer


async def test_many_requests_with_large_headers_on_one_connection(gateway: RunningGateway) -> None:
    headers = {f"x-{number}": "x" * 1000 for number in range(50)}
    async with httpx.AsyncClient(base_url=f"http://{gateway.address}", trust_env=False) as client:
        for _ in range(5):
            assert (await client.get("/health", headers=headers)).status_code == 200
            body = {"model": "nobody", "prompt": "x" * 500_000}
            assert (await client.post("/v1/completions", headers=headers, json=body)).status_code == 404


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="no IPv6 here")
async def test_ipv6(tmp_path: Path) -> None:
    async with running(tmp_path, "::1") as gateway, httpx.AsyncClient(trust_env=False) as client:
        assert (await client.get(f"http://{gateway.address}/health")).status_code == 200
