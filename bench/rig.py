"""The set-up of the engine benchmarks: a random model with adapters, a cluster that serves it, and plain vLLM.

Owns sizes and settings, so that all sides have equal ones. Four engines run, but only one side works at a time.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.plain import PlainEngine, plain_engine
from preft.cluster.secret import stored_secret
from preft.core.errors import PreftError
from preft.core.request import AdapterRef
from preft.rpc.secret import ClusterSecret
from preft_loadgen.child import bound
from preft_loadgen.served import ServeFailed, served
from preft_loadgen.transport.http import HttpClient

LORAS, REFTS = 64, 32
LORA_RANK, REFT_RANK = 16, 8
SLOTS = 8  # of the prefill worker, for adapters
VOCABULARY = 8192
MODEL_NAME = "base"
READY_SECONDS = 600.0
MiB = 1 << 20


@dataclass(frozen=True, slots=True)
class Rig:
    """The running set-up. Addresses are `host:port` of the two workers' gRPC services, which need the `secret`."""

    http: HttpClient
    prefill: str
    decode: str
    secret: ClusterSecret
    adapters: tuple[AdapterRef, ...]
    plain: PlainEngine
    multi_lora: PlainEngine | None  # vLLM with adapters
    model: dict[str, Any]  # facts about the generated model: parameters, adapters, ranks


def cluster_settings(folder: Path) -> dict[str, Any]:
    """The settings file's content. Both engines have equal settings, except for adapters."""
    engine = {"max_num_seqs": 64, "max_num_batched_tokens": 2048, "kv_cache_bytes": 512 * MiB}
    return {
        "model": str(folder / "model"),
        "served_model_name": MODEL_NAME,
        "max_model_len": 512,
        "adapters": {path.name: str(path) for path in sorted((folder / "adapters").iterdir())},
        "prefill": {**engine, "max_loras": SLOTS, "max_lora_rank": LORA_RANK},
        "decode": engine,
        "router": {"transfer_timeout": 120.0},  # decoding starts once all prompts have arrived: the first ones wait
    }


@asynccontextmanager
async def bench_rig(folder: Path, say: Callable[[str], None], *, multi_lora: bool) -> AsyncIterator[Rig]:
    """Makes and starts everything in `folder`, and ends it with the context. Raises PreftError or LoadgenError."""
    say(f"making a random model and {LORAS + REFTS} adapters")
    model = make_model(folder, loras=LORAS, lora_rank=LORA_RANK, refts=REFTS, reft_rank=REFT_RANK)
    settings = cluster_settings(folder)
    config = folder / "settings.json"
    config.write_text(json.dumps(settings))  # JSON is YAML
    # PreFT's engines compute on all cores. Plain vLLM reserves one core for an engine's second process. With few cores
    # this difference would decide every comparison, so plain vLLM reserves none here.
    os.environ["VLLM_CPU_NUM_OF_RESERVED_CPU"] = "0"
    say("starting the cluster")
    arguments, log = ["--config", str(config)], folder / "serve.log"
    with served(arguments, state_dir=folder / "state", log=log, ready_seconds=READY_SECONDS) as server:
        say(f"the cluster was ready after {server.start_seconds:.0f} s; starting plain vLLM")
        async with AsyncExitStack() as stack:
            plain = await stack.enter_async_context(plain_engine(config, folder / "plain.log"))
            lora = None
            if multi_lora:
                lora = await stack.enter_async_context(plain_engine(config, folder / "lora.log", lora=True))
            http = HttpClient(server.url)
            addresses = {worker["role"]: worker["address"] for worker in server.workers()}
            adapters = await served_adapters(http, settings["adapters"])
            secret = ClusterSecret(stored_secret(server.state_dir))
            yield Rig(http, addresses["prefill"], addresses["decode"], secret, adapters, plain, lora, model)


def make_model(folder: Path, **counts: int) -> dict[str, Any]:
    """Runs `bench.random_model`, whose numbers `counts` are, in a process of its own; returns facts about the model."""
    command = [sys.executable, "-m", "bench.random_model", str(folder)]
    options = [text for name, value in counts.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    ran = subprocess.run(bound([*command, *options]), capture_output=True, text=True, check=False)
    if ran.returncode != 0:
        raise PreftError(f"the random model could not be made: {ran.stderr.strip()}")
    made: dict[str, Any] = json.loads(ran.stdout)
    return made


async def served_adapters(http: HttpClient, folders: dict[str, str]) -> tuple[AdapterRef, ...]:
    """The catalog's adapters, with their folders as sources: the folders hold the content of the digests."""
    entries = (await http.get_json("/v1/adapters?limit=1000"))["data"]
    if len(entries) != len(folders):
        raise ServeFailed(f"{len(folders)} adapters were to be served, {len(entries)} are")
    return tuple(AdapterRef(entry["name"], entry["digest"], folders[entry["name"]]) for entry in entries)
