"""10,000 adapters known, 1,000 of them asked for in one run, memory for a hundred and 16 slots: all as themselves."""

from __future__ import annotations

import asyncio
import random
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from preft.adapters.catalog.adapter_catalog import CatalogView
from preft.cluster.adapters import open_catalog
from preft.core.settings import Settings, load_settings
from preft.state import open_store
from support.http import Ask, complete
from support.local_cluster import LocalCluster, local_cluster
from support.many_adapters import variants
from support.models import make_lora

from .conftest import ROOMY, Folders

pytestmark = [pytest.mark.vllm, pytest.mark.long, pytest.mark.timeout(1200)]

MiB = 1 << 20
KNOWN, ASKED, SAMPLE, SLOTS = 10_000, 1_000, 100, 16
HOST_BYTES, DISK_BYTES = MiB, 4 * MiB  # an adapter has 10 KB


@dataclass(frozen=True)
class Crowd:
    """A cluster whose adapters come from one folder."""

    cluster: LocalCluster
    folders: Folders
    root: Path


@pytest.fixture(scope="module")
def crowd(folders: Callable[[str], Folders], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Crowd]:
    own, root = folders("llama"), tmp_path_factory.mktemp("crowd")
    first = make_lora(root / "first", own.model, rank=2, seed=80, target_modules=("q_proj", "v_proj"))
    for _ in variants(first, root / "all", KNOWN):
        pass
    overrides = {
        **ROOMY,
        "prefill": {**ROOMY["prefill"], "max_loras": SLOTS},
        "adapter_dir": str(root / "all"),
        "store": {"host_bytes": HOST_BYTES, "disk_bytes": DISK_BYTES},
    }
    with local_cluster(own.model, tmp_path_factory.mktemp("state"), **overrides) as cluster:
        yield Crowd(cluster, own, root / "all")
    shutil.rmtree(root)


def known(crowd: Crowd) -> int:
    with httpx.Client(base_url=crowd.cluster.url) as client:
        return int(client.get("/v1/adapters?limit=1").json()["total"])


def test_a_zipf_run_over_a_thousand(crowd: Crowd) -> None:
    assert crowd.cluster.wait(lambda: known(crowd) == KNOWN, 600)
    draw = random.Random(3)
    names = [folder.name for folder in draw.sample(sorted(crowd.root.iterdir()), ASKED)]
    weights = [1 / rank for rank in range(1, ASKED + 1)]
    picks = names + draw.choices(names, weights, k=ASKED)  # each one once, and then by popularity
    draw.shuffle(picks)
    prompts = [[draw.randrange(3, 512) for _ in range(length)] for length in (5, 20, 40)]
    asks = [Ask(draw.choice(prompts), 6, name) for name in picks]
    answers: dict[tuple[int, str | None], list[int]] = {}
    most_disk = 0

    async def run() -> None:
        nonlocal most_disk
        limit = asyncio.Semaphore(48)

        async def one(client: httpx.AsyncClient, ask: Ask) -> None:
            async with limit:
                tokens = (await complete(client, "", ask))["choices"][0]["token_ids"]
            key = (len(ask.prompt), ask.adapter)
            assert answers.setdefault(key, tokens) == tokens

        async def watch() -> None:
            nonlocal most_disk
            while True:
                most_disk = max(most_disk, await asyncio.to_thread(_bytes, crowd.cluster.settings.state_dir))
                await asyncio.sleep(0.2)

        async with httpx.AsyncClient(base_url=crowd.cluster.url, timeout=300) as client:
            watching = asyncio.create_task(watch())
            await asyncio.gather(*(one(client, ask) for ask in asks))
            watching.cancel()

    started = time.monotonic()
    asyncio.run(run())
    seconds = time.monotonic() - started
    wrong = []
    for name in draw.sample(names, SAMPLE):
        for prompt in prompts:
            answer = answers.get((len(prompt), name))
            if answer is not None and answer != crowd.folders.reference.greedy(prompt, 6, crowd.root / name):
                wrong.append(name)
    assert wrong == []
    assert len({tuple(answer) for answer in answers.values()}) > ASKED / 2  # they do differ
    assert 0 < most_disk <= DISK_BYTES
    [tiers] = [worker.status().tiers for worker in crowd.cluster.workers.values() if worker.record.adapter_slots]
    assert tiers.host_bytes <= HOST_BYTES
    assert tiers.slots_used == SLOTS
    print(f"\n{len(asks)} requests under {ASKED} of {KNOWN} adapters in {seconds:.0f} s; {tiers}; disk {most_disk}")


def test_pages_are_quick(crowd: Crowd) -> None:
    """A second is a lot more than they take; it tells whether each page costs the whole catalog."""
    with httpx.Client(base_url=crowd.cluster.url) as client:
        for query in ("", "&after=a05000", "&search=99", "&kind=lora&after=a09000", "&pinned=true"):
            started = time.monotonic()
            page = client.get(f"/v1/adapters?limit=100{query}")
            seconds = time.monotonic() - started
            assert page.status_code == 200
            assert seconds < 1
            print(f"\npage{query}: {1000 * seconds:.1f} ms", end="")


def test_a_start_reads_the_catalog_and_no_adapter(crowd: Crowd, tmp_path: Path) -> None:
    """What gateway and workers do at a start, with 10,000 known adapters and with none."""
    many = crowd.cluster.settings
    none = load_settings(None, {"model": str(many.model), "state_dir": str(tmp_path)})
    seconds = [asyncio.run(_start(settings)) for settings in (none, many)]
    print(f"\nstart with none {seconds[0]:.2f} s, with {KNOWN} {seconds[1]:.2f} s")
    assert seconds[1] < seconds[0] + 2


async def _start(settings: Settings) -> float:
    started = time.monotonic()
    async with open_catalog(settings.model_copy(update={"adapter_dir": None})) as catalog:
        catalog.list()
        [path] = (settings.state_dir / "models").glob("*/catalog.sqlite")
        store = open_store(path, path.parent.name)
        await CatalogView(store).refresh()
        await store.close()
        return time.monotonic() - started


def _bytes(state_dir: Path) -> int:
    total = 0
    for file in (state_dir / "adapters").rglob("*"):
        try:
            total += file.stat().st_size if file.is_file() else 0
        except FileNotFoundError:
            continue
    return total
