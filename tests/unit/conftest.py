"""What the tests of vLLM's scheduler with our extensions share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from preft.memory.arena import StagingArena


@pytest.fixture
def arena() -> Iterator[StagingArena]:
    arena = StagingArena.create(1 << 20)
    yield arena
    arena.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from support.stepped_scheduler import config_folder  # imports vLLM: seconds

    return config_folder(tmp_path_factory.mktemp("model"))
