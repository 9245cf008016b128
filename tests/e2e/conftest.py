"""Clusters on real vLLM, shared by the tests of a session: an engine takes half a minute to start."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from support.local_cluster import LocalCluster, local_cluster
from support.models import make_lora, make_model, make_reft
from support.reference import Reference

torch.set_num_threads(1)  # the reference's matrices are tiny, and the engines need the other core

MiB = 1 << 20
RANKS = {"alice": 2, "bob": 8, "carol": 16}
REFTS: dict[str, dict[str, Any]] = {
    "loreft": {"method": "loreft", "rank": 8},
    "direft": {"method": "direft", "rank": 3, "layers": (0, 2)},
    "edges": {"method": "loreft", "rank": 4, "positions": "f2+l3"},
    "both": {"method": "direft", "rank": 2, "layers": (1,), "scale": 0.3},  # beside a LoRA
}


@dataclass(frozen=True)
class Served:
    """A cluster, the folders it was made from, and the reference for them."""

    cluster: LocalCluster
    model: Path
    adapters: dict[str, Path]
    reference: Reference

    @property
    def name(self) -> str:
        return self.model.name

    def expected(self, prompt: list[int], max_tokens: int, adapter: str | None) -> list[int]:
        return self.reference.greedy(prompt, max_tokens, self.adapters[adapter] if adapter else None)


def make_folders(root: Path, arch: str) -> tuple[Path, dict[str, Path]]:
    model = make_model(root / f"{arch}-tiny", arch, seed=1)  # type: ignore[arg-type]
    adapters = {name: make_lora(root / name, model, rank=rank, seed=rank) for name, rank in RANKS.items()}
    make_lora(root / "both", model, rank=4, seed=9, target_modules=("q_proj", "down_proj"))
    adapters |= {name: make_reft(root / name, model, seed=7, **kind) for name, kind in REFTS.items()}
    return model, adapters


ROOMY = {
    "prefill": {"max_loras": 4, "max_lora_rank": 16, "kv_cache_bytes": 64 * MiB, "staging_bytes": 64 * MiB},
    "decode": {"kv_cache_bytes": 64 * MiB, "staging_bytes": 64 * MiB},
    "router": {"transfer_timeout": 10},  # also the lease of a handle that nobody claims
}
"""Prompts in one chunk, no preemption; there are fewer slots than adapters."""

TIGHT = {
    "max_model_len": 1024,
    "prefill": {
        "max_loras": 2,
        "max_lora_rank": 16,
        "max_num_batched_tokens": 64,
        "kv_cache_bytes": 8 * MiB,
        "staging_bytes": 8 * MiB,
    },
    "decode": {"kv_cache_bytes": 2 * MiB, "staging_bytes": 8 * MiB},
}
"""64-token chunks, fewer slots than adapters, a decode cache of some 40 blocks so that requests are preempted."""


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The cluster that most tests share."""
    yield from _serve("llama", tmp_path_factory.mktemp("llama"), ROOMY)


@pytest.fixture(scope="session")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    yield from _serve("qwen2", tmp_path_factory.mktemp("qwen2"), ROOMY)


@pytest.fixture(params=["llama", "qwen2"])
def roomy(request: pytest.FixtureRequest) -> Served:
    """One cluster per architecture where everything fits."""
    return request.getfixturevalue(request.param)  # type: ignore[no-any-return]


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def tight(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One cluster per architecture where nothing does."""
    yield from _serve(request.param, tmp_path_factory.mktemp(f"tight-{request.param}"), TIGHT)


def _serve(arch: str, root: Path, overrides: dict[str, object]) -> Iterator[Served]:
    model, adapters = make_folders(root, arch)
    folders = {name: str(path) for name, path in adapters.items()}
    with local_cluster(model, root / "state", adapters=folders, **overrides) as cluster:
        yield Served(cluster, model, adapters, Reference(model))
