"""Workers on several Ray nodes. The nodes are real Ray processes with addresses of their own, engines are fake."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import httpx
import pytest

from support.ray_nodes import Nodes, serve, settings_of
from support.redis_server import running_redis

pytestmark = [pytest.mark.timeout(240), pytest.mark.long]

BUSY = 90.0  # seconds, on a machine that does other things too
ONE_EACH = {"prefill": 1.0, "decode": 1.0}


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    with ExitStack() as stack:
        yield Nodes(stack, tmp_path_factory.mktemp("ray"))


def ask(url: str, number: int) -> list[int]:
    """The tokens of one answer. Waits while workers are replaced."""
    body = {"model": "base", "prompt": [5, 6, number], "max_tokens": 40, "temperature": 0, "ignore_eos": True}
    reply = httpx.post(f"{url}/v1/completions", json=body | {"return_token_ids": True}, timeout=BUSY, trust_env=False)
    assert reply.status_code == 200, reply.text
    return list(reply.json()["choices"][0]["token_ids"])


def hosts(url: str) -> dict[str, str]:
    """Where the ready workers are, by role."""
    workers = httpx.get(f"{url}/v1/workers", timeout=BUSY, trust_env=False).json()["workers"]
    return {one["role"]: one["address"].rpartition(":")[0] for one in workers if one["state"] == "ready"}


def test_a_dead_nodes_workers_come_back_elsewhere_once_there_is_room(nodes: Nodes, tmp_path: Path) -> None:
    with running_redis(tmp_path / "redis") as redis, ThreadPoolExecutor() as threads, ExitStack() as stack:
        nodes.add("127.0.0.3", ONE_EACH)
        server = serve(stack, nodes, settings_of(tmp_path, nodes, state=redis.url()))
        url = server.said(r"is ready on (http://\S+)", BUSY)
        assert hosts(url) == {"prefill": "127.0.0.3", "decode": "127.0.0.3"}
        before = list(map(partial(ask, url), range(3)))
        begun = threads.submit(ask, url, 1)
        time.sleep(0.3)  # it decodes
        assert not begun.done()
        nodes.kill("127.0.0.3")
        new = threads.submit(ask, url, 2)
        server.said(r"(prefill-0: it waits for a node of the Ray cluster with .*1 prefill)", BUSY)
        nodes.add("127.0.0.4", ONE_EACH)
        assert [ask(url, 0), begun.result(), new.result()] == before
        assert hosts(url) == {"prefill": "127.0.0.4", "decode": "127.0.0.4"}


def test_nodes_that_join_get_workers(nodes: Nodes, tmp_path: Path) -> None:
    engine = {"fill_nodes": True, "staging_bytes": 1 << 20}
    roles = {role: {**engine, "resources": {role: 1}} for role in ("prefill", "decode")}
    with running_redis(tmp_path / "redis") as redis, ExitStack() as stack:
        server = serve(stack, nodes, settings_of(tmp_path, nodes, state=redis.url(), **roles))
        url = server.said(r"is ready on (http://\S+)", BUSY)  # on the node of the test before
        before = ask(url, 0)
        nodes.add("127.0.0.5", {"decode": 1.0})
        server.said(r"(decode-1: it is ready)", BUSY)
        nodes.kill("127.0.0.4")
        server.said(r"(decode-0: it ends)", BUSY)
        nodes.add("127.0.0.6", {"prefill": 1.0})
        assert ask(url, 0) == before
        assert hosts(url) == {"prefill": "127.0.0.6", "decode": "127.0.0.5"}


@pytest.mark.parametrize("how", ["terminate", "drain"])
def test_a_node_is_drained_without_a_failed_request(nodes: Nodes, tmp_path: Path, how: str) -> None:
    """Its workers are the only ones of their roles: they serve until the new ones are ready, or their time is over."""
    first, second = ("127.0.0.7", "127.0.0.8") if how == "terminate" else ("127.0.0.9", "127.0.0.10")
    with running_redis(tmp_path / "redis") as redis, ThreadPoolExecutor() as threads, ExitStack() as stack:
        room = {f"{how}-{role}": 1.0 for role in ("prefill", "decode")}  # on no node of the other tests
        nodes.add(first, room)
        roles = {role: {"resources": {f"{how}-{role}": 1}, "staging_bytes": 1 << 20} for role in ("prefill", "decode")}
        config = settings_of(tmp_path, nodes, state=redis.url(), shutdown_timeout=5, **roles)
        server = serve(stack, nodes, config)
        url = server.said(r"is ready on (http://\S+)", BUSY)
        assert hosts(url) == {"prefill": first, "decode": first}
        before = list(map(partial(ask, url), range(4)))
        over = threading.Event()

        def load(number: int) -> int:
            count = 0
            while not over.is_set():
                assert ask(url, number) == before[number]
                count += 1
            return count

        clients = [threads.submit(load, number) for number in range(4)]
        node = getattr(nodes, how)(first)
        server.said(r"(prefill-0: its node is drained)", BUSY)
        server.said(r"(prefill-1: it waits for a node of the Ray cluster)", BUSY)
        assert hosts(url) == {"prefill": first, "decode": first}
        nodes.add(second, room)
        for role in ("prefill", "decode"):
            server.said(rf"({role}-0: it ends)", BUSY)
        if how == "terminate":
            node.wait(BUSY)
        end = time.monotonic() + BUSY  # on a busy machine, the time of the first workers is over before these are ready
        while hosts(url) != {"prefill": second, "decode": second}:
            assert time.monotonic() < end, hosts(url)
            time.sleep(0.2)
        time.sleep(1)
        over.set()
        assert all(client.result() > 2 for client in clients)


def test_several_nodes_need_a_state_that_all_reach(nodes: Nodes, tmp_path: Path) -> None:
    with ExitStack() as stack:
        server = serve(stack, nodes, settings_of(tmp_path, nodes))
        assert server.ended(BUSY) == 1
        assert f"state: Ray at {nodes.address} has several nodes" in server.output
