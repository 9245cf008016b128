"""The servers under comparison: equal engines, limits and memory. One of them works at a time."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.vllm_server import vllm_server
from preft.adapters.formats.base_model import TARGETS
from preft_loadgen.measure.compare import Target
from preft_loadgen.measure.sweep import Population
from preft_loadgen.served import served
from preft_loadgen.synthetic import Kind
from preft_loadgen.transport.server import Server, open_server

NAME = "base"
READY_SECONDS = 1800.0
MiB = 1 << 20


@dataclass(frozen=True, slots=True)
class System:
    """One line of the comparison. Systems with equal `server` are one server under adapters of two kinds."""

    name: str
    server: str
    kind: Kind | None  # of the adapters
    engines: int = 1
    rounds: int | None = None  # at most: for a system that takes several times as long as the others


BASE = System("vLLM, base model", "base", None)
ALL_TOKENS = System("all tokens, our kernels", "all-tokens", Kind.LORA)
SYSTEMS = {
    "base": BASE,
    "multi-lora": System("vLLM multi-LoRA", "multi-lora", Kind.LORA, rounds=1),
    "all-tokens": ALL_TOKENS,
    "colocated-lora": System("PreFT colocated, LoRA", "colocated", Kind.LORA),
    "colocated-reft": System("PreFT colocated, LoReFT", "colocated", Kind.LOREFT),
    "disaggregated": System("PreFT disaggregated, LoRA", "disaggregated", Kind.LORA, engines=2),
}
"""By the word that names them on the command line."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """Limits of every engine. `cached` adapters have room in host memory, `adapter_bytes` each."""

    slots: int
    cached: int
    rank: int
    adapter_bytes: int
    length: int  # tokens of a request at most
    batch: int
    kv_bytes: int
    dtype: str
    gpu: bool
    step_tokens: int = 2048


Adapters = Mapping[Kind, Mapping[str, Path]]
"""The folders by kind and name."""


@asynccontextmanager
async def running(
    systems: Sequence[System], model: Path, adapters: Adapters, sizes: Sizes, folder: Path, say: Callable[[str], None]
) -> AsyncIterator[list[Target]]:
    """Starts the servers one after the other; `folder` is for their files. Raises PreftError or LoadgenError."""
    share = 0.9 / sum({system.server: system.engines for system in systems}.values())  # of a GPU's memory, per engine
    async with AsyncExitStack() as stack:
        opened: dict[str, Server] = {}
        targets = []
        for system in systems:
            if system.server not in opened:
                kinds = {other.kind for other in systems if other.server == system.server}
                own = {name: path for kind in kinds if kind for name, path in adapters.get(kind, {}).items()}
                say(f"starting {system.name}")
                place = folder / system.server
                place.mkdir()
                if system.server in ("colocated", "disaggregated"):
                    url = stack.enter_context(_preft(system.server, model, own, sizes, share, place))
                else:
                    arguments = _vllm_arguments(system.server, model, sizes, share)
                    url = stack.enter_context(vllm_server(arguments, place / "log", READY_SECONDS, own))
                server = await stack.enter_async_context(open_server(url, timeout=READY_SECONDS))
                opened[system.server] = server
            most = max(map(len, adapters.values()), default=0)
            names = (
                tuple(adapters.get(system.kind, ())) if system.kind else (NAME,) * most
            )  # for the base, its own name
            rounds = None if sizes.gpu else system.rounds
            targets.append(Target(system.name, opened[system.server], Population(NAME, names), rounds))
        yield targets


def _vllm_arguments(server: str, model: Path, sizes: Sizes, share: float) -> list[str]:
    options: dict[str, Any] = {
        "model": model,
        "served-model-name": NAME,
        "dtype": sizes.dtype,
        "max-model-len": sizes.length,
        "max-num-seqs": sizes.batch,
        "max-num-batched-tokens": sizes.step_tokens,
        "kv-cache-memory-bytes": sizes.kv_bytes,
        "gpu-memory-utilization": f"{share:.3f}",
        "distributed-executor-backend": "uni",  # as in PreFT's engines; a second process would spin while others work
    }
    flags = ["--disable-uvicorn-access-log"]
    if not sizes.gpu:
        options["block-size"] = 32
        flags.append("--enforce-eager")
    if server != "base":
        options |= {"max-loras": sizes.slots, "max-cpu-loras": sizes.cached, "max-lora-rank": sizes.rank}
        flags += ["--lora-target-modules", *TARGETS]
    if server == "all-tokens":
        device = "GPU" if sizes.gpu else "CPU"
        options["worker-cls"] = f"bench.all_tokens.AllToken{device}Worker"
    return [text for name, value in options.items() for text in (f"--{name}", str(value))] + flags


@contextmanager
def _preft(
    server: str, model: Path, adapters: Mapping[str, Path], sizes: Sizes, share: float, folder: Path
) -> Iterator[str]:
    config = folder / "settings.json"
    config.write_text(json.dumps(_settings(server, model, adapters, sizes, share)))  # JSON is YAML
    arguments, log = ["--config", str(config)], folder / "log"
    with served(arguments, state_dir=folder / "state", log=log, ready_seconds=READY_SECONDS) as started:
        yield started.url


def _settings(server: str, model: Path, adapters: Mapping[str, Path], sizes: Sizes, share: float) -> dict[str, Any]:
    colocated = server == "colocated"
    engine: dict[str, Any] = {
        "max_num_seqs": sizes.batch,
        "max_num_batched_tokens": sizes.step_tokens,
        "kv_cache_bytes": sizes.kv_bytes,
        "gpu_memory_utilization": round(share, 3),
    }
    if sizes.gpu:
        engine["num_gpus"] = 1.0 if colocated else 0.5
    return {
        "model": str(model),
        "served_model_name": NAME,
        "dtype": sizes.dtype,
        "max_model_len": sizes.length,
        "adapters": {name: str(path) for name, path in adapters.items()},
        "store": {"host_bytes": max(MiB, sizes.cached * sizes.adapter_bytes)},
        "prefill": {**engine, "max_loras": sizes.slots, "max_lora_rank": sizes.rank},
        **({"colocated": True} if colocated else {"decode": engine}),
    }
