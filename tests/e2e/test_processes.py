"""A cluster of processes of their own: two workers, two gateways and a Redis server that fails."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import yaml

from e2e.conftest import HEADS, RANKS, REFTS, ROOMY, Folders
from preft.cli.packing import Package
from support.http import Ask, complete, complete_all
from support.models import make_lora, make_reft
from support.processes import ServerProcess, running
from support.redis_server import RedisServer, running_redis

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

MODELS = (None, *RANKS, *HEADS, *REFTS)
SLOTS = ROOMY["prefill"]["max_loras"]
DRAIN_SECONDS = 60


@dataclass(frozen=True)
class Cluster:
    """`urls` are the two gateways. Adapters of `folders` are in the settings file."""

    folders: Folders
    redis: RedisServer
    workers: dict[str, ServerProcess]  # by role
    urls: tuple[str, str]

    @property
    def model(self) -> str:
        return self.folders.model.name

    def call(self, gateway: int, method: str, path: str, **body: object) -> httpx.Response:
        return httpx.request(method, self.urls[gateway] + path, timeout=60, **body)  # type: ignore[arg-type]

    def status(self, gateway: int, name: str) -> int:
        """The status of a request for the adapter."""
        body = {"model": name, "prompt": [5, 6], "max_tokens": 1}
        return self.call(gateway, "POST", "/v1/completions", json=body).status_code

    def workers_seen(self, gateway: int) -> list[dict[str, object]]:
        return list(self.call(gateway, "GET", "/v1/workers").json()["workers"])


@pytest.fixture(scope="module")
def cluster(folders: Callable[[str], Folders], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    root = tmp_path_factory.mktemp("processes")
    own = folders("llama")
    adapters = {name: str(path) for name, path in own.adapters.items()}
    settings = {**ROOMY, "model": str(own.model), "adapters": adapters, "shutdown_timeout": DRAIN_SECONDS}
    (root / "cluster.yaml").write_text(yaml.safe_dump(settings))
    with running_redis(root / "redis") as redis, ExitStack() as stack:
        common = ["--state", redis.url(), "--state-dir", str(root / "state"), "--config", str(root / "cluster.yaml")]

        def start(name: str, *arguments: str) -> ServerProcess:
            return stack.enter_context(running([*arguments, *common], root / f"{name}.log"))

        workers = {role: start(role, "worker", "--role", role, "--id", f"{role}-a") for role in ("prefill", "decode")}
        gateways = [start(f"gateway{number}", "gateway", "--port", "0") for number in range(2)]
        urls = [gateway.said(r"is ready on (http://\S+)") for gateway in gateways]
        yield Cluster(own, redis, workers, (urls[0], urls[1]))


@pytest.fixture(autouse=True)
def slots(cluster: Cluster) -> Iterator[None]:
    """Fails a test during which a gateway sees more adapters in slots than there are slots."""
    most, over = [0.0], threading.Event()

    def watch() -> None:
        for gateway in itertools.cycle(range(2)):
            if over.wait(0.2):
                return
            text = cluster.call(gateway, "GET", "/metrics").text
            used = re.findall(r"^preft_adapter_slots_used\{\S+ (\S+)$", text, re.MULTILINE)
            most.append(max(map(float, used), default=0.0))

    thread = threading.Thread(target=watch)
    thread.start()
    yield
    over.set()
    thread.join()
    assert max(most) <= SLOTS


def asks(count: int, max_tokens: int, seed: int) -> list[Ask]:
    draw = random.Random(seed)
    return [
        Ask([draw.randrange(3, 512) for _ in range(draw.choice((1, 17, 32, 130)))], max_tokens, MODELS[i % len(MODELS)])
        for i in range(count)
    ]


def expected(cluster: Cluster, ask: Ask) -> list[int]:
    return cluster.folders.expected(ask.prompt, ask.max_tokens, ask.adapter)


def within_a_second(happened: Callable[[], bool]) -> bool:
    end = time.monotonic() + 1
    while time.monotonic() < end:
        if happened():
            return True
        time.sleep(0.02)
    return False


def test_both_gateways_answer_as_the_reference_does(cluster: Cluster) -> None:
    sent = asks(54, 12, seed=1)
    halves = (sent[::2], sent[1::2])
    got: list[list[list[int]]] = [[], []]

    def ask(gateway: int) -> None:
        got[gateway] = complete_all(cluster.urls[gateway], cluster.model, halves[gateway])

    threads = [threading.Thread(target=ask, args=(gateway,)) for gateway in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for half, tokens in zip(halves, got, strict=True):
        assert tokens == [expected(cluster, ask) for ask in half]


def test_both_gateways_see_both_workers(cluster: Cluster) -> None:
    for gateway in range(2):
        seen = [(worker["id"], worker["role"], worker["state"]) for worker in cluster.workers_seen(gateway)]
        assert seen == [("decode-a", "decode", "ready"), ("prefill-a", "prefill", "ready")]


def test_adapters_change_on_both_gateways_at_once(cluster: Cluster, tmp_path: Path) -> None:
    prompt = asks(1, 8, seed=2)[0].prompt
    model, reference = cluster.folders.model, cluster.folders.reference
    versions = [
        make_lora(tmp_path / "one", model, rank=4, seed=81),
        make_reft(tmp_path / "two", model, rank=4, seed=82),
    ]
    versions.append(make_lora(tmp_path / "three", model, rank=8, seed=83))
    wanted = [reference.greedy(prompt, 8, folder) for folder in versions]
    assert len(set(map(tuple, wanted))) == 3

    def answers(*gateways: int) -> list[list[int]]:
        return [complete_all(cluster.urls[number], cluster.model, [Ask(prompt, 8, "dora")])[0] for number in gateways]

    assert cluster.status(1, "dora") == 404
    added = cluster.call(0, "POST", "/v1/adapters", json={"name": "dora", "source": str(versions[0])})
    assert added.status_code == 200, added.text
    assert within_a_second(lambda: cluster.status(1, "dora") == 200)
    assert answers(0, 1) == [wanted[0]] * 2

    replaced = {"name": "dora", "source": str(versions[1]), "replace": True}
    assert cluster.call(1, "POST", "/v1/adapters", json=replaced).status_code == 200
    assert within_a_second(lambda: answers(0) == [wanted[1]])
    assert answers(0, 1, 0, 1, 0, 1) == [wanted[1]] * 6

    archive = b"".join(Package.of(versions[2]))
    assert cluster.call(0, "PUT", "/v1/adapters/dora?replace=true", content=archive).status_code == 200
    shutil.rmtree(tmp_path)
    assert within_a_second(lambda: answers(1) == [wanted[2]])
    assert answers(0, 1, 0, 1) == [wanted[2]] * 4

    assert cluster.call(1, "DELETE", "/v1/adapters/dora").status_code == 200
    assert within_a_second(lambda: [cluster.status(gateway, "dora") for gateway in range(2)] == [404, 404])


def test_no_request_fails_while_redis_loses_everything(cluster: Cluster) -> None:
    """Redis is killed, is away for some seconds, and comes back empty."""
    sent, over = asks(36, 24, seed=3), threading.Event()
    for ask in sent:
        expected(cluster, ask)  # before the load: the reference is slow
    wrong: list[Ask] = []
    done = [0]

    async def load(url: str) -> None:
        async with httpx.AsyncClient(base_url=url, timeout=120) as client:

            async def send(asks: list[Ask]) -> None:
                for ask in itertools.cycle(asks):
                    if over.is_set():
                        return
                    body = await complete(client, cluster.model, ask)
                    done[0] += 1
                    if body["choices"][0]["token_ids"] != expected(cluster, ask):
                        wrong.append(ask)

            await asyncio.gather(*(send(sent[number::4]) for number in range(4)))

    failures: list[BaseException] = []

    def run(url: str) -> None:
        try:
            asyncio.run(load(url))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(url,)) for url in cluster.urls]
    for thread in threads:
        thread.start()
    time.sleep(1)
    cluster.redis.kill()
    time.sleep(3)
    before = done[0]
    cluster.redis.restart(with_data=False)
    time.sleep(12)  # also the time in which each worker renews its registration
    over.set()
    for thread in threads:
        thread.join()
    assert failures == []
    assert wrong == []
    assert done[0] > before > 0
    names = set(cluster.folders.adapters)
    for gateway in range(2):
        listed = cluster.call(gateway, "GET", "/v1/adapters").json()["data"]
        assert {adapter["name"] for adapter in listed} == names
        assert [worker["state"] for worker in cluster.workers_seen(gateway)] == ["ready", "ready"]
    stored = "".join(cluster.redis.command("HKEYS", key) for key in stored_hashes(cluster.redis))
    assert all(f"\n{name}\r\n" in stored for name in names)


def stored_hashes(redis: RedisServer) -> list[str]:
    keys = re.findall(r"preft:\S+", redis.command("KEYS", "preft:*"))
    return [key for key in keys if redis.command("TYPE", key).strip() == "+hash"]


def test_signals_and_dead_engines_end_workers_in_order(cluster: Cluster) -> None:
    """The last test: no worker is left after it."""
    ask = Ask([5] * 40, 300, "bob")
    body = {"model": "bob", "prompt": ask.prompt, "max_tokens": ask.max_tokens, "temperature": 0, "stream": True}
    body |= {"ignore_eos": True, "return_token_ids": True}
    decode, prefill = cluster.workers["decode"], cluster.workers["prefill"]
    tokens: list[int] = []
    with httpx.stream("POST", f"{cluster.urls[0]}/v1/completions", json=body, timeout=120) as reply:
        for line in reply.iter_lines():
            if line.startswith("data: {"):
                tokens += json.loads(line[6:])["choices"][0].get("token_ids") or []
                if 5 < len(tokens) < 200 and decode is cluster.workers.get("decode"):
                    decode.signal(signal.SIGTERM)
                    del cluster.workers["decode"]
    assert tokens == expected(cluster, ask)
    assert decode.ended() == 0
    assert within_a_second(lambda: [httpx.get(f"{url}/ready").status_code for url in cluster.urls] == [503, 503])

    [left] = cluster.workers_seen(1)
    (engine,) = left["engine_pids"]  # type: ignore[misc]
    os.kill(engine, signal.SIGKILL)
    assert prefill.ended() == 1
    last = prefill.output.splitlines()[-1]
    assert last.startswith("preft: the worker prefill-a ends, its engine has died: ")
    assert "Traceback" not in prefill.output
