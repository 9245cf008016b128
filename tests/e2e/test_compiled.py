"""With torch.compile on: the compiled graph takes adapters as the eager one does, also a batch of another size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from e2e.conftest import ROOMY, Folders, Served, serve
from e2e.test_parity import check, mixed
from support.http import complete_all

pytestmark = [pytest.mark.vllm, pytest.mark.long, pytest.mark.timeout(900)]


@pytest.fixture(scope="module", params=[("llama", True), ("qwen2", False)], ids=["llama_colocated", "qwen2"])
def compiled(
    request: pytest.FixtureRequest, folders: Callable[[str], Folders], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    arch, colocated = request.param
    state: Path = tmp_path_factory.mktemp("state")
    engines = {role: {**ROOMY[role], "enforce_eager": False} for role in ("prefill", "decode")}
    yield from serve(folders(arch), state, {**ROOMY, **engines, "colocated": colocated})


@pytest.mark.parametrize("count", [48, 7])
def test_mixed_concurrent_requests(compiled: Served, count: int) -> None:
    asks = mixed(count, 16, seed=1)
    check(compiled, asks, complete_all(compiled.cluster.url, compiled.name, asks))
