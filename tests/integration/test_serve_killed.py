"""Workers on Ray's nodes outlive `preft serve`, and the next one adopts them. Ray is real, engines are fake.

The requests go through a gateway of its own process, as in docker-compose.yml.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest

from preft.cluster.ray_workers import namespace_of
from preft.core.settings import load_settings
from support.processes import ServerProcess, alive, running
from support.ray_nodes import HEAD, Nodes, serve, settings_of
from support.redis_server import RedisServer, running_redis

pytestmark = [pytest.mark.timeout(480), pytest.mark.long]

BUSY = 120.0  # seconds, on a machine that does other things too
CLIENTS = 4
ROOM = {"prefill": 1.0, "decode": 2.0}
ENGINE = {"staging_bytes": 1 << 20}
ROLES = {
    "prefill": {**ENGINE, "resources": {"prefill": 1}},
    "decode": {**ENGINE, "resources": {"decode": 1}, "replicas": 2},
}


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with running_redis(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory, redis: RedisServer) -> Iterator[Nodes]:
    with ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "300")
        nodes = Nodes(stack, tmp_path_factory.mktemp("ray"), redis)
        nodes.add("127.0.0.3", ROOM)
        yield nodes


class Cluster:
    """A `preft serve`, which can be killed and started again, and a gateway beside it."""

    def __init__(self, stack: ExitStack, folder: Path, nodes: Nodes, redis: RedisServer) -> None:
        self._stack, self._folder, self._nodes, self._redis = stack, folder, nodes, redis
        self.started = 0
        self.config = folder / "serve-1" / "settings.json"

    def serve(self, **changes: object) -> ServerProcess:
        self.started += 1
        own = self._folder / f"serve-{self.started}"
        own.mkdir()
        state = {"state": self._redis.url(), "state_dir": str(self._folder / "state"), "shutdown_timeout": 30}
        given = {"model": str(self._folder / "serve-1" / "base"), **state, **ROLES, **changes}
        return serve(self._stack, self._nodes, settings_of(own, self._nodes, **given))

    def gateway(self) -> str:
        config = ["--config", str(self.config), "--port", "0"]
        process = self._stack.enter_context(running(["gateway", *config], self._folder / "gateway.log"))
        return process.said(r"is ready on (http://\S+)", BUSY)


@pytest.fixture
def cluster(tmp_path: Path, nodes: Nodes, redis: RedisServer) -> Iterator[Cluster]:
    with ExitStack() as stack:
        yield Cluster(stack, tmp_path, nodes, redis)


def pids(url: str, state: str = "ready") -> dict[str, int]:
    """The workers' processes, by name."""
    workers = httpx.get(f"{url}/v1/workers", timeout=BUSY, trust_env=False).json()["workers"]
    return {one["id"].partition("-")[2]: one["pid"] for one in workers if one["state"] == state}


def until(condition: Callable[[], bool], server: ServerProcess) -> None:
    end = time.monotonic() + BUSY
    while not condition():
        assert time.monotonic() < end, server.output
        time.sleep(0.2)


def ask(url: str, number: int, tokens: int = 40) -> tuple[int, ...]:
    body = {"model": "base", "prompt": [5, 6, number], "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    reply = httpx.post(f"{url}/v1/completions", json=body | {"return_token_ids": True}, timeout=BUSY, trust_env=False)
    assert reply.status_code == 200, reply.text
    return tuple(reply.json()["choices"][0]["token_ids"])


class Load:
    """Clients that ask one question after the other."""

    def __init__(self, url: str, threads: ThreadPoolExecutor) -> None:
        self._over = threading.Event()
        self.answers: list[list[tuple[int, ...]]] = [[] for _ in range(CLIENTS)]
        self._clients: list[Future[None]] = [threads.submit(self._ask, url, number) for number in range(CLIENTS)]

    def _ask(self, url: str, number: int) -> None:
        while not self._over.is_set():
            self.answers[number].append(ask(url, number))

    def goes_on(self) -> None:
        """Waits for two more answers of each client: the second question was asked after the call."""
        before = [len(each) for each in self.answers]
        end = time.monotonic() + BUSY
        while any(len(each) < count + 2 for each, count in zip(self.answers, before, strict=True)):
            assert time.monotonic() < end
            assert not any(client.done() for client in self._clients), [client.exception() for client in self._clients]
            time.sleep(0.1)

    def end(self) -> None:
        self._over.set()
        for client in self._clients:
            client.result()


@contextmanager
def load(url: str) -> Iterator[Load]:
    """Requests of which none may fail, and no answer may change."""
    with ThreadPoolExecutor(CLIENTS) as threads:
        going = Load(url, threads)
        try:
            yield going
        finally:
            going.end()
        assert all(len(set(each)) == 1 for each in going.answers)


def kill(server: ServerProcess) -> None:
    server.signal(signal.SIGKILL)
    server.ended()


def test_workers_outlive_preft_serve_and_are_adopted(cluster: Cluster) -> None:
    first = cluster.serve()
    first.said(r"is ready on (http://\S+)", BUSY)
    url = cluster.gateway()
    workers = pids(url)
    assert sorted(workers) == ["decode-0", "decode-1", "prefill-0"]
    with load(url) as going:
        going.goes_on()
        kill(first)
        going.goes_on()
        second = cluster.serve()
        second.said(r"(3 workers of an earlier `preft serve` run, and are adopted)", BUSY)
        own = second.said(r"is ready on (http://\S+)", BUSY)
        going.goes_on()
        assert pids(url) == pids(own) == workers
        # What it has adopted, it repairs, tells of, and counts.
        os.kill(workers["decode-1"], signal.SIGKILL)
        second.said(r"(decode-1: it has ended, and starts again)", BUSY)
        second.said(r"(decode-1: it is ready)", BUSY)
        until(lambda: len(pids(url)) == 3, second)
        going.goes_on()
    again = pids(url)
    assert again | {"decode-1": 0} == workers | {"decode-1": 0}
    assert "its process starts" not in second.output
    second.signal(signal.SIGTERM)
    assert second.ended(BUSY) == 0
    assert not any(map(alive, again.values()))
    third = cluster.serve()
    third.said(r"is ready on (http://\S+)", BUSY)
    assert "adopted" not in third.output
    third.signal(signal.SIGTERM)
    assert third.ended(BUSY) == 0


def test_adopted_workers_get_new_settings_one_by_one(cluster: Cluster) -> None:
    first = cluster.serve()
    first.said(r"is ready on (http://\S+)", BUSY)
    url = cluster.gateway()
    workers = pids(url)
    with load(url) as going:
        kill(first)
        second = cluster.serve(decode={**ROLES["decode"], "max_num_seqs": 9})
        for one in ("decode-2", "decode-3"):
            second.said(rf"({one}: it is ready)", BUSY)
        until(lambda: sorted(pids(url)) == ["decode-2", "decode-3", "prefill-0"], second)
        going.goes_on()
    assert pids(url)["prefill-0"] == workers["prefill-0"]
    assert second.output.index("decode-2: it is ready") < second.output.index("decode-3: its process starts")
    # Fewer workers: the one too many ends, with its requests.
    with load(url) as going:
        kill(second)
        third = cluster.serve(decode={**ROLES["decode"], "max_num_seqs": 9, "replicas": 1})
        third.said(r"(decode-3: it ends)", BUSY)
        until(lambda: sorted(pids(url)) == ["decode-2", "prefill-0"], third)
        going.goes_on()


def test_two_at_once_never_share_workers(cluster: Cluster) -> None:
    first = cluster.serve()
    first.said(r"is ready on (http://\S+)", BUSY)
    url = cluster.gateway()
    workers = pids(url)
    second = cluster.serve()
    second.said(rf"(waiting for the end of another `preft serve` \(process {first.pid} on )", BUSY)
    second.signal(signal.SIGTERM)
    assert second.ended(BUSY) == 0
    third = cluster.serve()
    third.said(r"(waiting for the end of another `preft serve`)", BUSY)
    kill(first)
    third.said(r"(3 workers of an earlier `preft serve` run, and are adopted)", BUSY)
    third.said(r"is ready on (http://\S+)", BUSY)
    ask(url, 1)
    assert pids(url) == workers


def test_workers_that_were_told_to_end_are_replaced(cluster: Cluster) -> None:
    """`preft serve` is killed while it ends: its workers would never serve again."""
    first = cluster.serve(max_model_len=1024)
    first.said(r"is ready on (http://\S+)", BUSY)
    url = cluster.gateway()
    with ThreadPoolExecutor() as threads:
        going = threads.submit(ask, url, 1, 600)  # for 18 s
        time.sleep(0.3)  # it decodes
        first.signal(signal.SIGTERM)
        until(lambda: len(pids(url, "draining")) == 3, first)
        kill(first)
        assert len(going.result()) == 600
    second = cluster.serve(max_model_len=1024)
    second.said(r"(decode-0: it was told to end, and is replaced)", BUSY)
    second.said(r"is ready on (http://\S+)", BUSY)
    assert len(ask(url, 1)) == 40
    until(lambda: sorted(pids(url)) == ["decode-2", "decode-3", "prefill-1"], second)


def test_workers_outlive_the_head_of_ray(cluster: Cluster, nodes: Nodes) -> None:
    first = cluster.serve()
    first.said(r"is ready on (http://\S+)", BUSY)
    url = cluster.gateway()
    workers = pids(url)
    with load(url) as going:
        nodes.kill(HEAD)
        kill(first)  # it was on the head's machine
        going.goes_on()
        nodes.start_head()
        second = cluster.serve()
        second.said(r"(3 workers of an earlier `preft serve` run, and are adopted)", BUSY)
        second.said(r"is ready on (http://\S+)", BUSY)
        going.goes_on()
        assert pids(url) == workers
        os.kill(workers["decode-1"], signal.SIGKILL)
        second.said(r"(decode-1: it is ready)", BUSY)
        going.goes_on()
    again = pids(url)
    second.signal(signal.SIGTERM)
    assert second.ended(BUSY) == 0
    assert not any(map(alive, again.values()))


def test_what_a_killed_start_has_left_is_ended(cluster: Cluster, nodes: Nodes) -> None:
    """A placement group without its actor would keep a worker's room for ever."""
    first = cluster.serve()
    first.said(r"is ready on (http://\S+)", BUSY)
    kill(first)
    namespace = namespace_of(load_settings(cluster.config))
    left = f"{namespace}:aaaaaaaa-decode-9:bbbbbbbb:run"
    table = "[one['name'] for one in ray.util.placement_group_table().values() if one['state'] != 'REMOVED']"
    made = f"ray.util.placement_group([{{'decode': 1}}], name='{left}', lifetime='detached')"
    assert left in nodes.run(f"{made}; print({table})")
    second = cluster.serve()
    second.said(r"is ready on (http://\S+)", BUSY)
    names = nodes.run(f"print({table})")
    assert left not in names
    assert names.count(f"{namespace}:") == 3
    second.signal(signal.SIGTERM)
    assert second.ended(BUSY) == 0
    assert f"{namespace}:" not in nodes.run(f"print({table})")


def test_settings_of_gateways_alone_replace_no_worker(cluster: Cluster) -> None:
    first = cluster.serve()
    first.said(r"is ready on (http://\S+)", BUSY)
    kill(first)
    second = cluster.serve(router={"max_queue": 7}, scaling={"target": 0.5}, allowed_origins=["http://a.example"])
    second.said(r"is ready on (http://\S+)", BUSY)
    second.signal(signal.SIGTERM)
    assert second.ended(BUSY) == 0
    assert "other settings" not in second.output
