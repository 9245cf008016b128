"""Part of `make bench-store`: times of one large adapter from disk to host memory, and from host memory to a slot.

One colocated engine has random weights and LoRAs of rank 320 on all linear layers, 104 MB each. For loads from disk the
page cache doesn't hold the files, and plain reads of the same files take turns with the loads.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import aclosing
from pathlib import Path

from bench.comparison import Comparison, comparison_table, take_turns
from bench.random_model import write_lora, write_model
from bench.saving import RESULTS, save
from preft.adapters.formats.digest import CHUNK, adapter_files
from preft.adapters.sources.limits import SourceLimits
from preft.adapters.sources.source import open_source
from preft.adapters.store.adapter_store import AdapterStore
from preft.adapters.store.disk_tier import DiskTier
from preft.core.cluster import Role
from preft.core.request import AdapterRef, Sampling
from preft.core.settings import GiB, load_settings
from preft.engine.port import EngineRequest
from preft.engine.vllm_engine import VllmEngine
from preft.memory.arena import StagingArena

RANK, ADAPTERS, SLOTS = 320, 3, 2
DISK_BAR = 0.5
SLOT_SECONDS = 0.1


async def _measure(folder: Path, rounds: int) -> list[Comparison]:
    write_model(folder / "model")
    disk, memory = DiskTier(folder / "disk", GiB, GiB), StagingArena.create(GiB)
    adapters = []
    for number in range(ADAPTERS):
        write_lora(folder / f"a{number}", RANK, number)
        digest, _ = disk.fetch(open_source(str(folder / f"a{number}")), lambda copy: None)
        adapters.append(AdapterRef(f"a{number}", digest, str(folder / f"a{number}")))
    copy = disk.root / adapters[0].digest
    size = sum((copy / name).stat().st_size for name in adapter_files(copy))
    prefill = {"max_loras": SLOTS, "max_lora_rank": RANK, "max_num_seqs": 4, "enable_prefix_caching": False}
    settings = load_settings(
        None, {"model": str(folder / "model"), "max_model_len": 128, "colocated": True, "prefill": prefill}
    )
    engine = await VllmEngine.start(settings, Role.COLOCATED, "", memory.path)
    store = AdapterStore(disk, memory, engine, SLOTS, SourceLimits())
    draw = random.Random(0)

    async def first_token(adapter: AdapterRef) -> float:
        """Seconds to one token of a short prompt."""
        request = EngineRequest(
            f"{draw.getrandbits(64):x}",
            tuple(draw.randrange(300, 8000) for _ in range(4)),
            Sampling(max_tokens=1, temperature=0.0),
            adapter=adapter,
        )
        started = time.perf_counter()
        async with store.using(adapter), aclosing(engine.generate(request)) as deltas:
            async for _ in deltas:
                pass
        return time.perf_counter() - started

    async def load(_round: int) -> float:
        store.forget([adapters[0].digest])
        await asyncio.to_thread(_drop_pages, copy)
        started = time.perf_counter()
        await store.prefetch(adapters[0])
        return size / (time.perf_counter() - started) / 1e9

    async def read(_round: int) -> float:
        await asyncio.to_thread(_drop_pages, copy)
        return size / await asyncio.to_thread(_read_seconds, copy, size) / 1e9

    async def fill(number: int) -> float:
        """Fills per second, from the extra time of a prompt whose adapter isn't in a slot over one whose adapter is."""
        adapter = adapters[number % ADAPTERS]  # the least recently used one
        seconds = await first_token(adapter) - min([await first_token(adapter) for _ in range(3)])
        return 1 / max(seconds, 1e-4)

    try:
        ours, reference = await take_turns([load, read], rounds, lambda: None)
        for adapter in adapters:
            await first_token(adapter)
        fills = [await fill(number) for number in range(rounds)]
    finally:
        await store.close()
        await engine.close()
        memory.close()
    megabytes = f"{size / 1e6:.0f} MB"
    return [
        Comparison(
            f"{megabytes} adapter, disk to memory",
            "GB/s",
            ours,
            reference,
            DISK_BAR,
            "ours: read, sha256, told to the engine; reference: reads of 1 MiB into memory that exists; no page cache",
        ),
        Comparison(
            f"{megabytes} adapter, memory to slot",
            "1/s",
            tuple(fills),
            (1 / SLOT_SECONDS,) * rounds,
            1.0,
            "time to one token under an adapter that is in no slot, less that under one that is; float16 to float32; "
            "reference: 100 ms",
        ),
    ]


def _drop_pages(folder: Path) -> None:
    for name in adapter_files(folder):
        descriptor = os.open(folder / name, os.O_RDONLY)
        os.fsync(descriptor)  # pages that aren't on disk yet can't be dropped
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def _read_seconds(folder: Path, size: int) -> float:
    memory = memoryview(bytearray(size))
    started, done = time.perf_counter(), 0
    for name in adapter_files(folder):
        with open(folder / name, "rb", buffering=0) as file:
            while count := file.readinto(memory[done : done + CHUNK]):
                done += count
    return time.perf_counter() - started


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench-tiers", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="preft-bench-", dir=Path.cwd()) as folder:  # /tmp may be memory
        comparisons = asyncio.run(_measure(Path(folder), arguments.rounds))
    print(comparison_table(comparisons))
    results = {"comparisons": [one.as_json() for one in comparisons]}
    print(f"all figures are in {save(arguments.out, 'tiers', 'bench.tiers', argv, results)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
