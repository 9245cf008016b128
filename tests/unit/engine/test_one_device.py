"""An engine of several ranks is refused before anything starts."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from vllm.engine.arg_utils import AsyncEngineArgs

from preft.core.cluster import Role
from preft.core.errors import ConfigError
from preft.core.settings import load_settings
from preft.engine.vllm_engine import VllmEngine, check_one_device


def parallel_sizes() -> list[str]:
    """All that vLLM has of this kind, also what it will have one day."""
    fields = (field.name for field in dataclasses.fields(AsyncEngineArgs))
    return [name for name in fields if name.endswith("parallel_size")]


@pytest.mark.parametrize("size", parallel_sizes())
@pytest.mark.parametrize("role", Role)
async def test_several_ranks_are_refused(tmp_path: Path, role: Role, size: str) -> None:
    settings = load_settings(None, {"model": str(tmp_path)})
    with pytest.raises(ConfigError, match=f"^{size}: 2 isn't supported yet"):
        await VllmEngine.start(settings, role, "arena", **{size: 2})


def test_one_rank_is_fine(tmp_path: Path) -> None:
    check_one_device(AsyncEngineArgs(model=str(tmp_path)))
