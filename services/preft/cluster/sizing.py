"""Chooses the workers' sizes that the settings leave open: GPUs per worker and staging memory.

Owns these decisions as pure functions, and the facts about this machine that they need.
"""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from preft.cluster.model import read_model_config
from preft.core.cluster import Role
from preft.core.errors import ConfigError
from preft.core.settings import GiB, MiB, Settings

LEAST_CPUS = 0.001  # of a worker in Ray's books
STAGED_PROMPTS = 4  # the longest prompts for which a worker has staging memory
STAGING_SHARE = 4  # all workers together get at most this fraction (1/4) of the machine's memory
CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def gpus_per_worker(settings: Settings, role: Role, gpu_build: bool) -> float:
    """GPUs that Ray reserves for each worker of `role`: by default 1 with vLLM's GPU build, 0 with the CPU build."""
    own = settings.engine(role).num_gpus
    return own if own is not None else float(gpu_build)


def worker_resources(settings: Settings, role: Role, gpu_build: bool) -> dict[str, float]:
    """What Ray reserves for each worker of `role`, on one node. Ray has no room for a worker that needs nothing."""
    own = settings.engine(role)
    return {"CPU": max(own.num_cpus, LEAST_CPUS), "GPU": gpus_per_worker(settings, role, gpu_build), **own.resources}


def check_gpus(settings: Settings, gpu_build: bool, present: float) -> None:
    """Raises ConfigError if the workers need more GPUs than are `present`: Ray would wait for ever."""
    each = {role: gpus_per_worker(settings, role, gpu_build) for role in settings.roles}
    asked = sum(settings.engine(role).replicas * gpus for role, gpus in each.items())
    if asked > present:
        keys = [role.value if role is not Role.COLOCATED else "prefill" for role in each]
        workers = " and ".join(
            f"{settings.engine(role).replicas} {role.value} worker{'s' if settings.engine(role).replicas > 1 else ''}"
            for role in each
        )
        shares = " and ".join(f"{key}.num_gpus and {key}.gpu_memory_utilization" for key in keys)
        raise ConfigError(
            f"{keys[0]}.num_gpus: {workers} ask for {asked:g} GPU{'s' if asked > 1 else ''} and there "
            f"{'is' if present == 1 else 'are'} {present:g}: start fewer workers, use --colocated, or set {shares} "
            "so that workers share a GPU"
        )


def has_gpu_build() -> bool:
    try:
        return not importlib.metadata.version("vllm").endswith("+cpu")
    except importlib.metadata.PackageNotFoundError:
        return False


def staging_bytes(settings: Settings, role: Role) -> int:
    own = settings.engine(role).staging_bytes
    if own is not None:
        return own
    token = kv_token_bytes(read_model_config(settings.model), settings.dtype, has_gpu_build())
    workers = sum(settings.engine(each).replicas for each in settings.roles)
    return default_staging_bytes(token * (settings.max_model_len or 0), machine_bytes(), workers)


def default_staging_bytes(longest_prompt: int, machine: int, workers: int) -> int:
    """Room for STAGED_PROMPTS of the longest prompt's bytes, at least 1 GiB, within the machine's share.

    The share divides a part of `machine` bytes among `workers` workers. Unused staging memory takes no pages.
    """
    return max(MiB, min(max(GiB, STAGED_PROMPTS * longest_prompt), machine // STAGING_SHARE // workers))


def kv_token_bytes(config: Mapping[str, Any], dtype: str | None, gpu_build: bool) -> int:
    """Bytes of one token's KV over all layers, from a model's config.json; 0 if the config lacks a figure."""
    wide = (dtype or ("auto" if gpu_build else "float32")) == "float32"
    try:
        layers = config["num_hidden_layers"]
        if config.get("kv_lora_rank"):
            values = config["kv_lora_rank"] + config["qk_rope_head_dim"]
        else:
            heads = config["num_attention_heads"]
            head_dim = config.get("head_dim") or config["hidden_size"] // heads
            values = 2 * (config.get("num_key_value_heads") or heads) * head_dim
        return int(layers * values) * (4 if wide else 2)
    except (KeyError, TypeError, ZeroDivisionError):
        return 0


def machine_bytes() -> int:
    """Memory of this machine, or of the container that this process runs in."""
    sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for limit in CGROUP_LIMITS:
        with suppress(OSError, ValueError):  # "max", or no such file
            sizes.append(int(limit.read_text()))
    return min(sizes)
