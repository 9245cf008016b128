"""The HTTP server as it is run: where it listens, and what it takes for a request."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import httpx
import pytest

from preft.cluster.gateway_process import MAX_HEADER_BYTES, RunningGateway, run_gateway
from preft.core.errors import ConfigError
from preft.core.settings import Settings
from preft.rpc.secret import ClusterSecret
from support.fake_workers import FakeCluster
from support.fakes import FakeCatalog
from support.lora_folders import write_base
from support.small_tokenizers import byte_level

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
MANY = b"x-name: value\r\n" * 100


@asynccontextmanager
async def running(folder: Path, host: str = "127.0.0.1", port: int = 0, **more: Any) -> AsyncIterator[RunningGateway]:
    byte_level(write_base(folder / "model"))
    settings = Settings(
        model=folder / "model", state_dir=folder / "state", host=host, port=port, max_model_len=64, **more
    )
    store, catalog = cast(Any, FakeCluster()), cast(Any, FakeCatalog.of())
    async with run_gateway(settings, ClusterSecret("of a test"), store, catalog, "x", "") as gateway:
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
    head, _, body = (await answer(gateway, start, part)).partition(b"HTTP/1.1 431 ")[2].partition(b"\r\n\r\n")
    assert b"content-length: %d" % len(body) in head
    assert json.loads(body)["error"]["code"] == "request_header_fields_too_large"


NO_REQUESTS = (
    b"GARBAGE", b"GET", b"GET / HTTP/9.9", b"G\0T / HTTP/1.1", b"GET /\xff\xfe HTTP/1.1", b"GET http://[::1 HTTP/1.1",
    b"GET * HTTP/1.1", b"CONNECT evil.example:443 HTTP/1.1", b"GET //evil.example/v1/models HTTP/1.1",
    b"GET /v1/models/%ff%00%0a HTTP/1.1", b"PRI * HTTP/2.0", b"\x16\x03\x01\x02\x00\x01",
)  # fmt: skip


async def test_what_is_no_request_gets_an_error_body(gateway: RunningGateway) -> None:
    host, port = gateway.address.split(":")
    for line in NO_REQUESTS:
        reader, writer = await asyncio.open_connection(host, int(port))
        try:
            writer.write(line + b"\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            head, _, body = (await asyncio.wait_for(reader.read(), 5)).partition(b"\r\n\r\n")
        finally:
            writer.transport.abort()
        assert head.startswith(b"HTTP/1.1 4"), line
        assert b"\r\ncontent-type: application/json" in head
        assert json.loads(body)["error"].keys() == {"message", "type", "param", "code"}


async def test_hosts_and_origins_of_the_settings(tmp_path: Path) -> None:
    more = {"allowed_hosts": ["gpu1.lan"], "allowed_origins": ["https://app.example.com"]}
    async with running(tmp_path, **more) as gateway, httpx.AsyncClient(trust_env=False) as client:

        async def status(**headers: str) -> int:
            return (await client.get(f"http://{gateway.address}/health", headers=headers)).status_code

        assert [await status(host=host) for host in ("gpu1.lan:80", "localhost", "evil.example", "10.0.0.1")] == [
            200, 200, 400, 400,
        ]  # fmt: skip
        assert [await status(origin=f"https://{site}.example.com") for site in ("app", "evil")] == [200, 403]


async def test_a_server_on_every_address_has_every_address_for_its_name(tmp_path: Path) -> None:
    async with running(tmp_path, "0.0.0.0") as gateway, httpx.AsyncClient(trust_env=False) as client:
        url = f"http://127.0.0.1:{gateway.address.split(':')[1]}/health"
        hosts = ("10.0.0.1:8000", "[fd00::1]", socket.gethostname(), "evil.example")
        statuses = [(await client.get(url, headers={"host": host})).status_code for host in hosts]
        assert statuses == [200, 200, 200, 400]


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


@pytest.mark.parametrize("host", ["no.such.host.invalid", "http://127.0.0.1", "192.0.2.1", "[::1]", "x" * 70, "a\0b"])
async def test_a_host_that_can_not_be_listened_on_is_named(tmp_path: Path, host: str) -> None:
    with pytest.raises(ConfigError, match=r"^host: can't listen on .*; choose another with --host$"):
        async with running(tmp_path, host):
            pass


async def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"^port: can't listen on 127.0.0.1:{port}: Address already in use; "):
            async with running(tmp_path, port=port):
                pass


def test_vllm_is_imported_only_for_a_parser() -> None:
    code = (
        "import sys\n"
        "from preft.cluster.gateway_process import load_parsers\n"
        "from preft.core.settings import load_settings\n"
        "assert load_parsers(load_settings(None, {'model': '/m'})) is None\n"
        "assert not {'vllm', 'torch', 'transformers'} & set(sys.modules)\n"
        "sys.modules['vllm'] = None\n"
        "try:\n"
        "    load_parsers(load_settings(None, {'model': '/m', 'reasoning_parser': 'qwen3'}))\n"
        "except Exception as error:\n"
        "    print(type(error).__name__, error)\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("ConfigError reasoning_parser: gateways with parsers need vLLM")
