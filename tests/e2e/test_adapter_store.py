"""Far more adapters than fit: through all tiers to exact tokens, changed while they are used, and never another's."""

from __future__ import annotations

import asyncio
import io
import math
import os
import random
import shutil
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from preft.adapters.formats.digest import adapter_digest
from preft.cluster.adapters import uploads_folder
from support.http import Ask, complete, complete_all, post
from support.local_cluster import LocalCluster, local_cluster
from support.many_adapters import variants
from support.models import make_lora
from support.moto_s3 import S3, s3_server

from .conftest import ROOMY, Folders

pytestmark = pytest.mark.vllm

MiB = 1 << 20
COUNT = 80
SLOTS = 4
HOST_BYTES, DISK_BYTES = MiB, 2 * MiB  # of 80 adapters with 51 KB each


@dataclass(frozen=True)
class Store:
    """A cluster that can't hold what it serves."""

    cluster: LocalCluster
    folders: Folders
    many: list[Path]
    watched: Path
    s3: S3

    def ask(self, *asks: Ask) -> list[list[int]]:
        return complete_all(self.cluster.url, self.folders.model.name, asks)

    def expected(self, ask: Ask, folder: Path) -> list[int]:
        return self.folders.reference.greedy(ask.prompt, ask.max_tokens, folder)

    def call(self, method: str, path: str, **options: Any) -> httpx.Response:
        with httpx.Client(base_url=self.cluster.url, timeout=60) as client:
            return client.request(method, path, **options)

    def states(self, name: str) -> list[str]:
        """Where the worker has the adapter: ["slot"], ["host"], ["loading"], or nowhere in memory."""
        return [worker["state"] for worker in self.call("GET", f"/v1/adapters/{name}").json()["workers"]]

    def becomes(self, name: str, states: list[str]) -> bool:
        """Whether the router hears of these states soon."""
        return self.cluster.wait(lambda: self.states(name) == states, 5)

    def disk(self) -> Path:
        return self.cluster.settings.state_dir / "adapters"


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    with s3_server() as server:
        yield server


@pytest.fixture(scope="module")
def store(folders: Callable[[str], Folders], tmp_path_factory: pytest.TempPathFactory, s3: S3) -> Iterator[Store]:
    own, root = folders("llama"), tmp_path_factory.mktemp("many")
    make_lora(root / "first", own.model, rank=2, seed=50)
    many = list(variants(root / "first", root, COUNT))
    (root / "watched").mkdir()
    overrides = {
        **ROOMY,
        "prefill": {**ROOMY["prefill"], "max_loras": SLOTS},
        "adapters": {folder.name: str(folder) for folder in many},
        "adapter_dir": str(root / "watched"),
        "store": {"host_bytes": HOST_BYTES, "disk_bytes": DISK_BYTES, "source_timeout": 3},
    }
    with local_cluster(own.model, tmp_path_factory.mktemp("state"), **overrides) as cluster:
        yield Store(cluster, own, many, root / "watched", s3)


def prompt_of(length: int, seed: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(3, 512) for _ in range(length)]


def folder_bytes(folder: Path) -> int:
    """What lies in `folder`, of which parts may vanish meanwhile."""
    total = 0
    for place, _, names in os.walk(folder):  # unlike rglob, passes by folders that vanish during the walk
        for name in names:
            with suppress(FileNotFoundError):
                total += (Path(place) / name).stat().st_size
    return total


def test_every_adapter_answers_as_itself_although_few_fit(store: Store) -> None:
    """Each of 80 three times, in random order, 24 at a time, over 4 slots, some 18 places in memory and 38 on disk."""
    draw = random.Random(1)
    picks = [folder for folder in store.many for _ in range(3)]
    draw.shuffle(picks)
    asks = [Ask(prompt_of(draw.choice((3, 33, 70)), number), 10, folder.name) for number, folder in enumerate(picks)]
    most = 0

    async def run() -> list[list[int]]:
        nonlocal most
        limit = asyncio.Semaphore(24)

        async def one(client: httpx.AsyncClient, ask: Ask) -> list[int]:
            async with limit:
                body = await complete(client, "", ask)
                return list(body["choices"][0]["token_ids"])

        async def watch() -> None:
            nonlocal most
            while True:
                most = max(most, await asyncio.to_thread(folder_bytes, store.disk()))
                await asyncio.sleep(0.05)

        async with httpx.AsyncClient(base_url=store.cluster.url, timeout=300) as client:
            watching = asyncio.create_task(watch())
            try:
                return await asyncio.gather(*(one(client, ask) for ask in asks))
            finally:
                watching.cancel()

    answers = asyncio.run(run())
    wrong = [
        ask.adapter
        for ask, folder, answer in zip(asks, picks, answers, strict=True)
        if answer != store.expected(ask, folder)
    ]
    assert wrong == []
    assert len({tuple(answer) for answer in answers}) > len(answers) / 2  # they do differ
    assert 0 < most <= DISK_BYTES
    [load] = [worker.status().tiers for worker in store.cluster.workers.values() if worker.record.adapter_slots]
    assert load.host_bytes <= load.host_bytes_total == HOST_BYTES
    assert load.host_evictions > 0
    assert load.disk_evictions > 0
    assert load.slots_used == SLOTS
    assert store.cluster.idle()


@pytest.mark.long
def test_a_reload_under_load_switches_whole_requests(store: Store, tmp_path: Path) -> None:
    """200 requests while a name is switched 50 times: one version answers each, the one it was admitted under."""
    versions = [make_lora(tmp_path / f"v{seed}", store.folders.model, rank=4, seed=seed) for seed in (301, 302)]
    prompt = prompt_of(40, 77)
    ask = Ask(prompt, 12, "switched")
    truth = [store.expected(ask, folder) for folder in versions]
    assert truth[0] != truth[1]
    digests = [adapter_digest(folder)[:16] for folder in versions]
    switches: list[tuple[float, float, int]] = []  # begun, done, version
    answers: list[tuple[float, float, int]] = []  # sent, done, version

    async def switch(client: httpx.AsyncClient, number: int) -> None:
        begun = time.monotonic()
        body = {"lora_name": "switched", "lora_path": str(versions[number % 2]), "load_inplace": True}
        response = await client.post("/v1/load_lora_adapter", json=body)
        assert response.status_code == 200, response.text
        switches.append((begun, time.monotonic(), number % 2))

    async def ask_on(client: httpx.AsyncClient, last: asyncio.Event) -> None:
        while not last.is_set():
            sent = time.monotonic()
            body = await complete(client, "", ask)
            version = digests.index(body["system_fingerprint"])
            assert body["choices"][0]["token_ids"] == truth[version]
            answers.append((sent, time.monotonic(), version))

    async def run() -> None:
        last, limits = asyncio.Event(), httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=store.cluster.url, timeout=300, limits=limits) as client:
            await switch(client, 0)
            asking = [asyncio.create_task(ask_on(client, last)) for _ in range(200)]
            for number in range(1, 51):
                await switch(client, number)
            last.set()
            await asyncio.gather(*asking)

    asyncio.run(run())
    assert len(answers) >= 200
    assert len(switches) == 51
    ends = [*(done for _, done, _ in switches[1:]), math.inf]  # of each version's time
    periods = [(begun, end, version) for (begun, _, version), end in zip(switches, ends, strict=True)]
    for sent, done, version in answers:  # it was the name's version at some moment of the request
        assert any(begun <= done and sent <= end and version == current for begun, end, current in periods)
    assert {version for _, _, version in answers} == {0, 1}
    assert store.call("GET", "/v1/adapters/switched").json()["version"] == 51


def test_an_upload_is_served_and_leaves_with_its_name(store: Store, tmp_path: Path) -> None:
    folder = make_lora(tmp_path / "uploaded", store.folders.model, rank=3, seed=5)
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        archive.add(folder, "anything")
    response = store.call("PUT", "/v1/adapters/up/loaded", content=packed.getvalue())
    assert response.status_code == 200, response.text
    ask = Ask(prompt_of(20, 5), 8, "up/loaded")
    assert store.ask(ask) == [store.expected(ask, folder)]
    uploads = uploads_folder(store.cluster.settings)
    assert len(list(uploads.iterdir())) == 1
    assert store.call("DELETE", "/v1/adapters/up/loaded").status_code == 200
    assert list(uploads.iterdir()) == []
    assert post(store.cluster.url, "/v1/completions", {"model": "up/loaded", "prompt": [5]}).status_code == 404


def test_a_pinned_adapter_stays_in_memory(store: Store) -> None:
    pinned, others = store.many[0], store.many[1:40]
    store.ask(*(Ask([5, 6, 7], 2, folder.name) for folder in others))
    assert store.becomes(pinned.name, [])
    assert store.call("PATCH", f"/v1/adapters/{pinned.name}", json={"pinned": True}).json()["pinned"]
    assert store.becomes(pinned.name, ["host"])  # nobody has asked for it
    store.ask(*(Ask([5, 6, 7], 2, folder.name) for folder in others))
    time.sleep(1)  # the router hears of changes within a second
    assert store.states(pinned.name) == ["host"]
    store.call("PATCH", f"/v1/adapters/{pinned.name}", json={"pinned": False})
    time.sleep(1)  # workers follow the catalog within a second
    store.ask(*(Ask([5, 6, 7], 2, folder.name) for folder in others))
    assert store.becomes(pinned.name, [])


def test_a_folder_of_adapters_is_followed(store: Store, tmp_path: Path) -> None:
    def served() -> bool:
        return store.call("GET", "/v1/adapters/newcomer").status_code == 200

    ask = Ask(prompt_of(20, 8), 8, "newcomer")
    first = make_lora(tmp_path / "one", store.folders.model, rank=2, seed=61)
    shutil.copytree(first, store.watched / "newcomer")
    assert store.cluster.wait(served, 10)
    assert store.ask(ask) == [store.expected(ask, first)]
    second = make_lora(tmp_path / "two", store.folders.model, rank=2, seed=62)
    for file in second.iterdir():
        shutil.copyfile(file, store.watched / "newcomer" / file.name)
    assert store.cluster.wait(lambda: store.ask(ask) == [store.expected(ask, second)], 10)
    shutil.rmtree(store.watched / "newcomer")
    assert store.cluster.wait(lambda: not served(), 10)


def test_adapters_from_s3_come_back_after_they_were_evicted(store: Store, tmp_path: Path) -> None:
    folder = make_lora(tmp_path / "remote", store.folders.model, rank=2, seed=71)
    uri = store.s3.upload(folder, "adapters/remote")
    added = store.call("POST", "/v1/adapters", json={"name": "remote", "source": uri})
    assert added.status_code == 200, added.text
    ask = Ask(prompt_of(20, 9), 8, "remote")
    assert store.ask(ask) == [store.expected(ask, folder)]
    push_out(store, "remote")
    assert store.ask(ask) == [store.expected(ask, folder)]
    push_out(store, "remote")
    other = make_lora(tmp_path / "other", store.folders.model, rank=2, seed=72)
    store.s3.upload(other, "adapters/remote")  # overwritten behind the catalog's back
    refused = post(store.cluster.url, "/v1/completions", {"model": "remote", "prompt": [5], "max_tokens": 1})
    assert refused.status_code == 503
    assert "no longer holds the version" in refused.json()["error"]["message"]
    store.s3.remove("adapters/remote")
    gone = post(store.cluster.url, "/v1/completions", {"model": "remote", "prompt": [5], "max_tokens": 1})
    assert gone.status_code == 503
    assert gone.json()["error"]["code"] == "adapter_unavailable"
    assert "s3://" not in gone.json()["error"]["message"]
    folder = make_lora(tmp_path / "again", store.folders.model, rank=2, seed=71)
    store.s3.upload(folder, "adapters/remote")
    assert store.ask(ask) == [store.expected(ask, folder)]


def push_out(store: Store, name: str) -> None:
    """Others use the adapter store until `name` is neither in memory nor on disk."""
    digest = store.call("GET", f"/v1/adapters/{name}").json()["digest"]
    for start in range(0, COUNT, 16):
        store.ask(*(Ask([5, 6, 7], 1, folder.name) for folder in store.many[start : start + 16]))
    assert not (store.disk() / digest).exists()
    assert store.becomes(name, [])


def test_metrics_tell_of_the_tiers(store: Store) -> None:
    text = store.call("GET", "/metrics").text
    for name in ("preft_adapter_slots_used", "preft_adapter_hits_total", "preft_adapter_load_seconds_sum"):
        assert f"{name}{{" in text
    [slots] = [line for line in text.splitlines() if line.startswith("preft_adapter_slots{")]
    assert float(slots.split()[-1]) == SLOTS
