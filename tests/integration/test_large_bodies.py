"""No request body holds anybody up: streams go on while the gateway receives and reads or refuses the body.

Blocks of the event loop are measured in the process's CPU time, which other work on the machine doesn't stretch.
"""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator

import httpx
import pytest

from preft.core.settings import MiB
from support.local_cluster import LocalCluster, local_cluster
from support.models import make_model
from support.worker_servers import StartPaced

pytestmark = pytest.mark.timeout(120)

STREAMS, TOKENS = 10, 100


def text(size: int) -> bytes:
    return json.dumps({"model": "model", "prompt": "word " * (size // 5)}).encode()


def ids(size: int) -> bytes:
    return json.dumps({"model": "model", "prompt": [4321] * (size // 6)}).encode()


BODIES = {
    "30 MB of text": (text(30_000_000), 413),
    "30 MB of token ids": (ids(30_000_000), 413),
    "4 MB of text": (text(4_000_000), 400),
    "4 MB of token ids": (ids(4_000_000), 400),
}
LONGEST_BLOCK = 0.6  # CPU seconds; 4 MB of token ids are parsed in one piece, for 0.1 s on a quiet machine


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    folder = tmp_path_factory.mktemp("large")
    model = make_model(folder / "model", max_position_embeddings=128)
    small = {"staging_bytes": MiB}
    with local_cluster(model, folder / "state", start_engine=StartPaced(), prefill=small, decode=small) as cluster:
        yield cluster


def post(cluster: LocalCluster, body: bytes, pieces: int, seconds: float) -> bytes:
    """Sends the body in pieces; returns the answer's first bytes."""
    host, _, port = cluster.gateway.address.rpartition(":")
    head = f"POST /v1/completions HTTP/1.1\r\nhost: {cluster.gateway.address}\r\ncontent-type: application/json\r\n"
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(f"{head}content-length: {len(body)}\r\nconnection: close\r\n\r\n".encode())
        size = -(-len(body) // pieces)
        for start in range(0, len(body), size):
            connection.sendall(body[start : start + size])
            time.sleep(seconds / pieces)
        return connection.recv(64)


def stream(cluster: LocalCluster, number: int, tokens: list[int]) -> None:
    body = {"model": "model", "prompt": [5, 6, number], "max_tokens": TOKENS, "ignore_eos": True}
    body |= {"stream": True, "return_token_ids": True}
    with httpx.stream("POST", f"{cluster.url}/v1/completions", json=body, timeout=60) as reply:
        for line in reply.iter_lines():
            if line.startswith("data: {"):
                tokens += json.loads(line[6:])["choices"][0].get("token_ids") or []


async def longest_block(over: threading.Event) -> float:
    """The most CPU seconds of this process between two turns of the loop."""
    longest, before = 0.0, time.process_time()
    while not over.is_set():
        await asyncio.sleep(0.002)
        now = time.process_time()
        longest, before = max(longest, now - before), now
    return longest


@pytest.mark.parametrize("kind", BODIES)
@pytest.mark.parametrize(("pieces", "seconds"), [(1, 0.0), (50, 2.0)])
def test_streams_go_on(cluster: LocalCluster, kind: str, pieces: int, seconds: float) -> None:
    body, status = BODIES[kind]
    tokens: list[list[int]] = [[] for _ in range(STREAMS)]
    threads = [threading.Thread(target=stream, args=(cluster, number, tokens[number])) for number in range(STREAMS)]
    for thread in threads:
        thread.start()
    assert cluster.wait(lambda: all(tokens), 30)
    over = threading.Event()
    watch = asyncio.run_coroutine_threadsafe(longest_block(over), cluster.loop)
    assert post(cluster, body, pieces, seconds).startswith(b"HTTP/1.1 %d " % status)
    over.set()
    assert watch.result(30) < LONGEST_BLOCK
    for thread in threads:
        thread.join()
    assert all(len(each) == TOKENS for each in tokens)
