"""Every kind of decoder layer that is said to take adapters: parity with the reference, in one engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from e2e.conftest import ROOMY, Folders, Served, serve
from e2e.test_parity import MODELS, check, mixed
from support.http import complete_all

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.long,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),  # PEFT's, about merging
]


@pytest.fixture(scope="module", params=["mistral", "qwen3", "gemma2", "gemma3"])
def served(
    request: pytest.FixtureRequest, folders: Callable[[str], Folders], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    state: Path = tmp_path_factory.mktemp("state")
    yield from serve(folders(request.param), state, {**ROOMY, "colocated": True})


def test_mixed_concurrent_requests(served: Served) -> None:
    asks = mixed(48, 16, seed=1)
    assert {ask.adapter for ask in asks} == set(MODELS)
    told_apart = sum(
        served.expected(ask.prompt, ask.max_tokens, ask.adapter) != served.expected(ask.prompt, ask.max_tokens, None)
        for ask in asks
        if ask.adapter
    )
    assert told_apart >= 24  # else parity would prove little
    check(served, asks, complete_all(served.cluster.url, served.name, asks))
    assert served.cluster.idle()
