"""Gateways that die, refuse, are slow or aren't there: what is repeated, what isn't, and the one error at the end."""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from preft.adapters.formats.digest import LORA_FILES
from preft.core.errors import EngineFailed as ServersEngineFailed
from preft.core.errors import QueueFull as ServersQueueFull
from preft.core.errors import ShuttingDown as ServersShuttingDown
from preft.core.errors import WorkerLost as ServersWorkerLost
from preft_client import (
    AsyncClient,
    ConnectionFailed,
    DeadlineExceeded,
    EngineFailed,
    ModelNotFound,
    QueueFull,
    StreamBroken,
    Unavailable,
    WorkerLost,
)
from support.fakes import Script
from support.processes import ServerProcess
from support.redis_server import free_port
from support.sdk_clients import a_client
from support.sdk_gateway import ENDLESS, IDS, ScriptedGateway, gateway_in_thread

from .test_calls import until


class GatewayProcess:
    """A gateway that can be killed."""

    def __init__(self, log: Path, seconds: float) -> None:
        self._process = ServerProcess([str(seconds)], log, module="support.sdk_gateway")
        both = self._process.said(r"serving (\S+ \S+)")
        self.urls = dict(zip(("http", "grpc"), both.split(), strict=True))

    def running(self) -> float:
        """Its requests, by its own count."""
        lines = httpx.get(f"{self.urls['http']}/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith("preft_requests_running{"))

    def kill(self) -> None:
        self._process.signal(signal.SIGKILL)
        self._process.ended()

    def close(self) -> None:
        self._process.close()


@pytest.fixture
def silent(tmp_path: Path) -> Iterator[GatewayProcess]:
    """A gateway that never sends a token."""
    process = GatewayProcess(tmp_path / "silent.log", 3600)
    yield process
    process.close()


@pytest.fixture
def slow(tmp_path: Path) -> Iterator[GatewayProcess]:
    """A gateway that sends 20 tokens a second, for 20 seconds."""
    process = GatewayProcess(tmp_path / "slow.log", 0.05)
    yield process
    process.close()


def kill_once_it_runs(process: GatewayProcess) -> Any:
    def wait_and_kill() -> None:
        until(lambda: process.running() == 1)
        process.kill()

    thread = threading.Thread(target=wait_and_kill)
    thread.start()
    return thread


def test_a_gateway_killed_before_the_first_token_costs_nothing(
    way: tuple[str, str], gateway: ScriptedGateway, silent: GatewayProcess
) -> None:
    transport, style = way
    with a_client(style, [silent.urls[transport], gateway.urls[transport]], retries=0) as client:
        killing = kill_once_it_runs(silent)
        answer = client.chat([{"role": "user", "content": "hi"}], model="base")
        killing.join()
        assert answer.token_ids == IDS[:5]
        assert client.generate("hi", model="base").token_ids == IDS[:5]  # asks the living one first
    assert len(gateway.generator.requests) == 2


def test_a_gateway_killed_after_the_first_token_is_one_clear_error(
    way: tuple[str, str], gateway: ScriptedGateway, slow: GatewayProcess
) -> None:
    transport, style = way
    with (
        a_client(style, [slow.urls[transport], gateway.urls[transport]], retries=5) as client,
        client.stream("hi", model="base", max_tokens=400) as stream,
    ):
        got = [next(stream) for _ in range(3)]
        slow.kill()
        with pytest.raises(StreamBroken, match="broke off after its beginning") as broken:
            got += list(stream)
        assert broken.value.code == "stream_broken"
        tokens = tuple(token for delta in got for token in delta.token_ids)
        assert stream.generation.token_ids[: len(tokens)] == tokens == ENDLESS[: len(tokens)]
        assert list(stream) == []
    assert gateway.generator.requests == []


def test_without_a_server(way: tuple[str, str]) -> None:
    url = f"{way[0]}://127.0.0.1:{free_port()}"
    with a_client(way[1], url, retries=1) as client:
        for call in (
            lambda: client.generate("hi", model="base"),
            lambda: client.adapters.get("alice"),
            lambda: client.adapters.remove("alice"),
            client.ready,
        ):
            with pytest.raises(ConnectionFailed, match=url.removeprefix("grpc://")) as failed:
                call()
            assert not failed.value.sent
        with pytest.raises((ConnectionFailed, DeadlineExceeded)):
            client.wait_ready(timeout=0.5)


def test_a_full_queue_is_asked_again_after_the_time_it_names(way: tuple[str, str], gateway: ScriptedGateway) -> None:
    full, short = Script(fail=ServersQueueFull("the queue is full", 1.2)), gateway.scripts[0]
    gateway.scripts[:] = [full, short]
    with a_client(way[1], gateway.urls[way[0]], retries=1) as client:
        started = time.monotonic()
        assert client.generate("hi", model="base").token_ids == IDS[:5]
        assert time.monotonic() - started >= 2.0  # the header rounds up
        gateway.scripts[:] = [full]
        with pytest.raises(QueueFull, match="the queue is full") as refused:
            client.generate("hi", model="base", timeout=1.5)
        assert refused.value.retry_after == 2.0  # no use to wait beyond the limit
    assert len(gateway.generator.requests) == 3


def test_another_gateway_is_asked_at_once(
    way: tuple[str, str], gateway: ScriptedGateway, tokenizer_folder: Path
) -> None:
    with gateway_in_thread(tokenizer_folder) as other:
        other.scripts[:] = [Script(fail=ServersQueueFull("the queue is full", 300))]
        urls = [other.urls[way[0]], gateway.urls[way[0]]]
        with a_client(way[1], urls, retries=0) as client:
            assert client.generate("hi", model="base", timeout=200).token_ids == IDS[:5]
        assert len(other.generator.requests) == 1


@pytest.mark.parametrize("error", [ServersShuttingDown("it stops", 0.1), ServersWorkerLost("a worker died")])
def test_unavailable_is_asked_again(way: tuple[str, str], gateway: ScriptedGateway, error: Exception) -> None:
    gateway.scripts[:] = [Script(fail=error), gateway.scripts[0]]
    with a_client(way[1], gateway.urls[way[0]], retries=1) as client:
        assert client.generate("hi", model="base").token_ids == IDS[:5]
        gateway.scripts[:] = [Script(fail=error)]
        with pytest.raises(Unavailable, match=str(error)):
            client.generate("hi", model="base")
    assert len(gateway.generator.requests) == 4


def test_an_engines_error_is_not_asked_again(way: tuple[str, str], gateway: ScriptedGateway) -> None:
    gateway.scripts[:] = [Script(fail=ServersEngineFailed("the engine gave up"))]
    with a_client(way[1], gateway.urls[way[0]], retries=5) as client, pytest.raises(EngineFailed, match="gave up"):
        client.generate("hi", model="base")
    assert len(gateway.generator.requests) == 1


def test_an_error_after_the_first_token_is_final(way: tuple[str, str], gateway: ScriptedGateway) -> None:
    gateway.scripts[:] = [Script(ENDLESS, fail=ServersWorkerLost("the worker died"), fail_after=3)]
    with a_client(way[1], gateway.urls[way[0]], retries=5) as client:
        with client.stream("hi", model="base", max_tokens=400) as stream:
            assert next(stream).token_ids[:1] == ENDLESS[:1]
            with pytest.raises(WorkerLost, match="the worker died"):
                list(stream)
        assert stream.generation.token_ids == ENDLESS[:3]
        with pytest.raises(WorkerLost):
            client.generate("hi", model="base", max_tokens=400)
    assert len(gateway.generator.requests) == 2


@pytest.mark.parametrize("delay", [3600.0, 0.1])
def test_a_time_limit_holds_here_and_on_the_server(
    way: tuple[str, str], gateway: ScriptedGateway, delay: float
) -> None:
    gateway.scripts[:] = [Script(ENDLESS, delay=delay)]
    with a_client(way[1], gateway.urls[way[0]], retries=3) as client:
        started = time.monotonic()
        with pytest.raises(DeadlineExceeded):
            client.generate("hi", model="base", max_tokens=400, timeout=1.0)
        assert time.monotonic() - started >= 0.9
    [request] = gateway.generator.requests
    assert request.deadline is not None
    assert abs(request.deadline - time.time()) < 60
    until(lambda: gateway.generator.left == gateway.generator.entered)


def test_the_default_limit_travels_too(way: tuple[str, str], gateway: ScriptedGateway) -> None:
    with a_client(way[1], gateway.urls[way[0]], timeout=1000) as client:
        client.chat([{"role": "user", "content": "hi"}], model="base")
    [request] = gateway.generator.requests
    assert request.deadline is not None
    assert 800 < request.deadline - time.time() <= 1050  # gRPC rounds up


def test_leaving_frees_the_request(way: tuple[str, str], gateway: ScriptedGateway) -> None:
    gateway.scripts[:] = [Script(ENDLESS, delay=0.02)]
    with a_client(way[1], gateway.urls[way[0]]) as client:
        with client.stream("hi", model="base", max_tokens=400, n=2) as stream:
            next(stream)
        until(lambda: gateway.generator.cancelled == gateway.generator.entered != [])
        assert gateway.deps.registry.get_sample_value("preft_requests_running", {"kind": "base"}) == 0
        gateway.reset()
        assert client.generate("hi", model="base").token_ids == IDS[:5]


@pytest.mark.parametrize("transport", ["http", "grpc"])
async def test_a_cancelled_task_frees_its_request_before_the_first_token(
    transport: str, gateway: ScriptedGateway
) -> None:
    gateway.scripts[:] = [Script(ENDLESS, delay=3600)]
    async with AsyncClient(gateway.urls[transport]) as client:
        task = asyncio.create_task(client.generate("hi", model="base"))
        await asyncio.to_thread(until, lambda: gateway.generator.entered)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.to_thread(until, lambda: gateway.generator.cancelled == gateway.generator.entered)
        gateway.reset()
        assert (await client.generate("hi", model="base")).token_ids == IDS[:5]


@pytest.mark.parametrize("style", ["sync", "async"])
def test_many_streams_at_once(style: str, gateway: ScriptedGateway) -> None:
    """None waits for another: the pool of HTTP connections has no limit."""
    gateway.scripts[:] = [Script(ENDLESS, delay=0.05)]
    count = 110
    with a_client(style, gateway.urls["http"]) as client:
        streams = [client.stream("hi", model="base", max_tokens=400) for _ in range(count)]
        for stream in streams:
            assert next(stream).token_ids[:1] == ENDLESS[:1]
        for stream in streams:
            stream.cancel()
        until(lambda: len(gateway.generator.left) == count)


def test_a_refused_name_is_not_asked_at_every_gateway(way: tuple[str, str], gateway: ScriptedGateway) -> None:
    urls = [gateway.urls[way[0]]] * 3
    with a_client(way[1], urls) as client, pytest.raises(ModelNotFound):
        client.generate("hi", model="nobody")


def test_what_is_done_twice_is_repeated_and_a_removal_is_not(way: tuple[str, str]) -> None:
    """A server that takes the request and closes the connection: nobody knows what it did."""
    listener = socket.create_server(("127.0.0.1", 0))
    taken: list[bytes] = []

    def take_and_close() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                data = connection.recv(65536)
                if way[0] == "http":
                    taken.append(data.split()[0])

    thread = threading.Thread(target=take_and_close)
    thread.start()
    try:
        with a_client(way[1], f"{way[0]}://127.0.0.1:{listener.getsockname()[1]}", retries=1) as client:
            for call in (lambda: client.adapters.add("bob", "/x"), lambda: client.adapters.remove("bob")):
                with pytest.raises(ConnectionFailed):
                    call()
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()
    if way[0] == "http":
        assert taken == [b"POST", b"POST", b"DELETE"]


def test_an_error_of_the_callers_own_progress_stays_as_it_is(
    way: tuple[str, str], gateway: ScriptedGateway, tmp_path: Path
) -> None:
    for name in LORA_FILES:
        (tmp_path / name).write_text("x")

    def fail(done: int, total: int | None) -> None:
        raise ValueError("the caller's own")

    gateway.catalog.steps = [(1, 2)]
    with a_client(way[1], gateway.urls[way[0]]) as client:
        with pytest.raises(ValueError, match="the caller's own"):
            client.adapters.add("bob", "/adapters/bob", progress=fail)
        if way[0] == "http":
            with pytest.raises(ValueError, match="the caller's own"):
                client.adapters.upload("carol", tmp_path, progress=fail)
    until(lambda: gateway.catalog.adding == 0)
    assert "carol" not in gateway.catalog.archives


def test_leaving_an_add_cancels_it(way: tuple[str, str], gateway: ScriptedGateway) -> None:
    gateway.catalog.gate = gateway.call(_event())
    with a_client(way[1], gateway.urls[way[0]], retries=0) as client:
        with pytest.raises(DeadlineExceeded):
            client.adapters.add("bob", "/adapters/bob", timeout=1)
        until(lambda: gateway.catalog.cancelled == ["bob"])
        with pytest.raises(ModelNotFound):
            client.adapters.get("bob")
        with pytest.raises(DeadlineExceeded, match="bob"):
            client.adapters.wait("bob", timeout=0.5)


async def _event() -> asyncio.Event:
    return asyncio.Event()
