"""Clusters on real vLLM, shared by the tests of a session: an engine takes half a minute to start."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from support.local_cluster import LocalCluster, local_cluster
from support.models import LINEARS, make_lora, make_model, make_reft
from support.overflow import with_overflowing_token
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
HEADS: dict[str, dict[str, Any]] = {  # with a LoRA on the output layer
    "head": {"rank": 5, "target_modules": (*LINEARS, "lm_head")},
    "headonly": {"rank": 3, "target_modules": ("lm_head",)},
}


class Folders:
    """A model, adapters of every kind for it, and the reference for both."""

    def __init__(self, root: Path, arch: str) -> None:
        self.model = make_model(root / f"{arch}-tiny", arch, seed=1)  # type: ignore[arg-type]
        if arch in ("llama", "qwen2"):
            with_overflowing_token(self.model)
        self.adapters = {name: make_lora(root / name, self.model, rank=rank, seed=rank) for name, rank in RANKS.items()}
        self.adapters |= {name: make_lora(root / name, self.model, seed=5, **kind) for name, kind in HEADS.items()}
        make_lora(
            root / "both",
            self.model,
            rank=4,
            seed=9,
            target_modules=("q_proj", "down_proj"),
            rank_pattern={"q_proj": 13},
        )
        self.adapters |= {name: make_reft(root / name, self.model, seed=7, **kind) for name, kind in REFTS.items()}
        self.reference = Reference(self.model)
        self._known: dict[tuple[object, ...], list[int]] = {}  # several clusters are asked the same

    def expected(self, prompt: list[int], max_tokens: int, adapter: str | None) -> list[int]:
        key = (*prompt, None, max_tokens, adapter)
        if key not in self._known:
            folder = self.adapters[adapter] if adapter else None
            self._known[key] = self.reference.greedy(prompt, max_tokens, folder)
        return self._known[key]


@dataclass(frozen=True)
class Served:
    """A cluster and the folders that it serves."""

    cluster: LocalCluster
    folders: Folders

    @property
    def model(self) -> Path:
        return self.folders.model

    @property
    def adapters(self) -> dict[str, Path]:
        return self.folders.adapters

    @property
    def reference(self) -> Reference:
        return self.folders.reference

    @property
    def name(self) -> str:
        return self.model.name

    def expected(self, prompt: list[int], max_tokens: int, adapter: str | None) -> list[int]:
        return self.folders.expected(prompt, max_tokens, adapter)


ROOMY: dict[str, Any] = {
    "prefill": {"max_loras": 4, "max_lora_rank": 16, "kv_cache_bytes": 64 * MiB, "staging_bytes": 64 * MiB},
    "decode": {"kv_cache_bytes": 64 * MiB, "staging_bytes": 64 * MiB},
    "router": {"transfer_timeout": 10},  # also the lease of a handle that nobody claims
}
"""Prompts in one chunk, no preemption; there are fewer slots than adapters."""

TIGHT: dict[str, Any] = {
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
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Folders]:
    """The folders of an architecture, made once."""
    return functools.cache(lambda arch: Folders(tmp_path_factory.mktemp(arch), arch))


@pytest.fixture(scope="session")
def llama(folders: Callable[[str], Folders], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The cluster that most tests share."""
    yield from serve(folders("llama"), tmp_path_factory.mktemp("state"), ROOMY)


@pytest.fixture(scope="session")
def qwen2(folders: Callable[[str], Folders], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    yield from serve(folders("qwen2"), tmp_path_factory.mktemp("state"), ROOMY)


@pytest.fixture(scope="session")
def llama_colocated(folders: Callable[[str], Folders], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    yield from serve(folders("llama"), tmp_path_factory.mktemp("state"), {**ROOMY, "colocated": True})


@pytest.fixture(scope="session")
def qwen2_colocated(folders: Callable[[str], Folders], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    yield from serve(folders("qwen2"), tmp_path_factory.mktemp("state"), {**ROOMY, "colocated": True})


BOTH = ["llama", "llama_colocated"]
ALL = [*BOTH, *(pytest.param(name, marks=pytest.mark.long) for name in ("qwen2", "qwen2_colocated"))]


@pytest.fixture(params=ALL)
def roomy(request: pytest.FixtureRequest) -> Served:
    """Both architectures, both ways to serve, where everything fits."""
    return request.getfixturevalue(request.param)  # type: ignore[no-any-return]


@pytest.fixture(params=BOTH)
def either(request: pytest.FixtureRequest) -> Served:
    """Both ways to serve."""
    return request.getfixturevalue(request.param)  # type: ignore[no-any-return]


@pytest.fixture(scope="session", params=ALL)
def tight(
    request: pytest.FixtureRequest, folders: Callable[[str], Folders], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    """The same where nothing fits."""
    arch, _, colocated = request.param.partition("_")
    overrides = {**TIGHT, "prefill": TIGHT["prefill"] | TIGHT["decode"], "colocated": True} if colocated else TIGHT
    yield from serve(folders(arch), tmp_path_factory.mktemp("state"), overrides)


def serve(folders: Folders, state: Path, overrides: dict[str, Any]) -> Iterator[Served]:
    paths = {name: str(path) for name, path in folders.adapters.items()}
    with local_cluster(folders.model, state, adapters=paths, **overrides) as cluster:
        yield Served(cluster, folders)
