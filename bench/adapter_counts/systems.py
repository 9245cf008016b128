"""The servers under comparison: equal engines, limits and memory. All are up at once, and one works at a time."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.adapter_counts.vllm_server import vllm_server
from preft.adapters.formats.base_model import TARGETS
from preft_loadgen.measure.compare import Target
from preft_loadgen.measure.sweep import Population
from preft_loadgen.served import served
from preft_loadgen.transport.server import open_server

NAME = "base"
BASE, MULTI_LORA, ALL_TOKENS = "vLLM, base model", "vLLM, multi-LoRA", "all tokens, our kernels"
COLOCATED, REFT, DISAGGREGATED = "PreFT colocated, LoRA", "PreFT colocated, ReFT", "PreFT disaggregated, LoRA"
SYSTEMS = (BASE, MULTI_LORA, ALL_TOKENS, COLOCATED, REFT, DISAGGREGATED)
"""The first is the reference."""
READY_SECONDS = 1800.0
MiB = 1 << 20


@dataclass(frozen=True, slots=True)
class Sizes:
    """Limits of every engine. `cached` adapters have room in host memory, `adapter_bytes` each."""

    slots: int
    cached: int
    rank: int
    adapter_bytes: int
    length: int  # tokens of a request at most
    batch: int = 64
    step_tokens: int = 2048
    kv_bytes: int = 512 * MiB


@asynccontextmanager
async def running(
    systems: tuple[str, ...],
    folder: Path,
    loras: Mapping[str, Path],
    refts: Mapping[str, Path],
    sizes: Sizes,
    say: Callable[[str], None],
) -> AsyncIterator[list[Target]]:
    """Starts the servers of `folder`/model one after the other. Raises PreftError or LoadgenError."""
    async with AsyncExitStack() as stack:
        targets = []
        for number, system in enumerate(systems):
            say(f"starting {system}")
            log = folder / f"server-{number}.log"
            adapters = {} if system == BASE else refts if system == REFT else loras
            if system in (BASE, MULTI_LORA, ALL_TOKENS):
                arguments = _vllm_arguments(system, folder, sizes)
                url = stack.enter_context(vllm_server(arguments, log, READY_SECONDS, adapters))
            else:
                config = folder / f"settings-{number}.json"
                config.write_text(json.dumps(_settings(system, folder, adapters, sizes)))  # JSON is YAML
                server = served(
                    ["--config", str(config)],
                    state_dir=folder / f"state-{number}",
                    log=log,
                    ready_seconds=READY_SECONDS,
                )
                url = stack.enter_context(server).url
            names = tuple(adapters) or (NAME,) * max(len(loras), 1)  # the base model answers in place of each adapter
            opened = await stack.enter_async_context(open_server(url, timeout=READY_SECONDS))
            targets.append(Target(system, opened, Population(NAME, names)))
        yield targets


def _vllm_arguments(system: str, folder: Path, sizes: Sizes) -> list[str]:
    options: dict[str, Any] = {
        "model": folder / "model",
        "served-model-name": NAME,
        "dtype": "float32",
        "max-model-len": sizes.length,
        "max-num-seqs": sizes.batch,
        "max-num-batched-tokens": sizes.step_tokens,
        "block-size": 32,
        "kv-cache-memory-bytes": sizes.kv_bytes,
    }
    flags = ["--enforce-eager", "--disable-uvicorn-access-log"]
    if system != BASE:
        options |= {"max-loras": sizes.slots, "max-cpu-loras": sizes.cached, "max-lora-rank": sizes.rank}
        flags += ["--lora-target-modules", *TARGETS]
    if system == ALL_TOKENS:
        options |= {"worker-cls": "bench.all_tokens.AllTokenCPUWorker", "distributed-executor-backend": "uni"}
    return [text for name, value in options.items() for text in (f"--{name}", str(value))] + flags


def _settings(system: str, folder: Path, adapters: Mapping[str, Path], sizes: Sizes) -> dict[str, Any]:
    engine = {
        "max_num_seqs": sizes.batch,
        "max_num_batched_tokens": sizes.step_tokens,
        "kv_cache_bytes": sizes.kv_bytes,
    }
    settings: dict[str, Any] = {
        "model": str(folder / "model"),
        "served_model_name": NAME,
        "max_model_len": sizes.length,
        "adapters": {name: str(path) for name, path in adapters.items()},
        "store": {"host_bytes": sizes.cached * sizes.adapter_bytes},
        "prefill": {**engine, "max_loras": sizes.slots, "max_lora_rank": sizes.rank},
    }
    if system == DISAGGREGATED:
        return {**settings, "decode": engine}
    return {**settings, "colocated": True}
