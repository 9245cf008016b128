"""Part of `make bench-gpu`: prompt tokens/s of one colocated engine with many adapters, against the base model.

The model has dummy weights of Llama-3.1-8B's shapes (`--small`: 88 million parameters, for CPU). Each prompt has its
own adapter and generates one token. The sides take turns in one engine. All LoRAs share one piece of memory, and so do
all ReFTs; for the engine they are different adapters of the same size.
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
from dataclasses import asdict
from functools import partial
from pathlib import Path

from bench.comparison import Comparison, comparison_table, take_turns
from bench.random_model import LLAMA_8B, SMALL, Shape, write_lora, write_reft
from bench.saving import RESULTS, save
from preft.adapters.formats.digest import adapter_digest
from preft.adapters.store.packed import AdapterFiles
from preft.core.cluster import Role
from preft.core.request import AdapterRef, Sampling
from preft.core.settings import GiB, Settings, load_settings
from preft.engine.port import EngineRequest
from preft.engine.vllm_engine import VllmEngine
from preft.memory.arena import Region, StagingArena

LORA_RANK, REFT_RANK = 16, 8
LORA_BAR, REFT_BAR = 0.90, 0.97


async def _measure(model: Shape, folder: Path, prompts: int, tokens: int, rounds: int) -> list[Comparison]:
    model.write_config(folder / "model", "bfloat16")
    write_lora(folder / "lora", LORA_RANK, 1, model)
    write_reft(folder / "reft", REFT_RANK, 2, model)
    loras, refts = (
        [
            AdapterRef(f"{kind}{number}", f"{number:032x}{kind.encode().hex():0>32}", str(folder / kind))
            for number in range(prompts)
        ]
        for kind in ("lora", "reft")
    )
    memory = StagingArena.create(GiB)
    engine = await VllmEngine.start(
        _settings(folder / "model", prompts, tokens), Role.COLOCATED, "", memory.path, load_format="dummy"
    )
    draw = random.Random(0)

    async def one(adapter: AdapterRef | None) -> None:
        prompt = tuple(draw.randrange(3, model.vocabulary) for _ in range(tokens))
        request = EngineRequest(
            f"{draw.getrandbits(64):x}", prompt, Sampling(max_tokens=1, temperature=0.0), 0, adapter
        )
        async with aclosing(engine.generate(request)) as deltas:
            async for _ in deltas:
                pass

    async def speed(adapters: Sequence[AdapterRef | None], _round: int) -> float:
        started = time.perf_counter()
        await asyncio.gather(*map(one, adapters))
        return prompts * tokens / (time.perf_counter() - started)

    try:
        for adapters, kind in ((loras, "lora"), (refts, "reft")):
            region = await _packed(folder / kind, memory)
            for adapter in adapters:
                await engine.place_adapter(adapter, region)
        sides = [partial(speed, adapters) for adapters in ([None] * prompts, loras, refts)]
        base, *others = await take_turns(sides, rounds, lambda: None)
    finally:
        await engine.close()
        memory.close()
    how = f"{prompts} prompts of {tokens} tokens at once, each under its own adapter; all in one engine"
    kinds = (
        (f"LoRA of rank {LORA_RANK}, all linear layers", LORA_BAR),
        (f"ReFT of rank {REFT_RANK}, all layers", REFT_BAR),
    )
    return [
        Comparison(f"prefill, {prompts} x {what}", "tokens/s", measured, base, bar, how)
        for (what, bar), measured in zip(kinds, others, strict=True)
    ]


async def _packed(folder: Path, memory: StagingArena) -> Region:
    files = AdapterFiles(folder)
    region = await memory.reserve(files.packed_size, timeout=1)
    files.pack(memory.view(region), adapter_digest(folder))
    files.close()
    return region


def _settings(model: Path, prompts: int, tokens: int) -> Settings:
    prefill = {
        "max_loras": prompts,
        "max_lora_rank": LORA_RANK,
        "max_num_seqs": prompts,
        "max_num_batched_tokens": 8192,
        "enable_prefix_caching": False,
    }
    return load_settings(
        None, {"model": str(model), "max_model_len": 2 * tokens, "colocated": True, "prefill": prefill}
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench-adapted-prefill", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--small", action="store_true", help="a small model, few adapters, short prompts")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    sizes = (SMALL, 16, 128) if arguments.small else (LLAMA_8B, 64, 512)
    with tempfile.TemporaryDirectory(prefix="preft-bench-") as folder:
        comparisons = asyncio.run(_measure(sizes[0], Path(folder), *sizes[1:], arguments.rounds))
    print(comparison_table(comparisons))
    figures = {"model": asdict(sizes[0]), "comparisons": [one.as_json() for one in comparisons]}
    path = save(arguments.out, "adapted-prefill", "bench.adapted_prefill", argv, figures)
    print(f"all figures are in {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
