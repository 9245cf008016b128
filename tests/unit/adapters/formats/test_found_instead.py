"""A folder that isn't an adapter says what it is and what to give instead."""

from __future__ import annotations

from pathlib import Path

import pytest

from preft.adapters.formats.found_instead import explain
from preft.adapters.sources.source import open_source
from preft.core.errors import InvalidAdapter, SourceNotFound
from support.lora_folders import write_base, write_lora


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["adapter_model-00001-of-00002.safetensors"], r"-00001-of-00002\.safetensors in F is one of several files"),
        (["adapter_model.safetensors.index.json"], "is one of several files with the weights"),
        (["adapter_model.bin", "config.json"], r"adapter_model\.bin in F is a pickle file"),
        (["adapter.pt"], "is a pickle file"),
        (["intkey_layer.0.bin"], "preft adapter convert"),
        (["adapters.safetensors"], "MLX saved"),
        (["alice-lora.gguf"], "is a GGUF file"),
        (["config.json", "model.safetensors"], r"model\.safetensors in F belongs to a whole model"),
        (["model-00001-of-00004.safetensors"], "belongs to a whole model"),
        (["pytorch_model.bin"], "belongs to a whole model"),
        (["checkpoint-10/", "checkpoint-9/", "runs/"], r"in its subfolders \(checkpoint-9, checkpoint-10\)"),
        (["best/adapter_config.json", "model.safetensors"], r"in its subfolders \(best\)"),
    ],
    ids=str,
)
def test_what_is_there(names: list[str], says: str) -> None:
    with pytest.raises(AssertionError, match=says):
        raise AssertionError(explain(names, "F"))


def test_nothing_to_say() -> None:
    assert explain(["README.md", "config.json", "optimizer.pt"], "F") is None
    assert explain([], "F") is None


def test_local_folders(tmp_path: Path) -> None:
    for step in (10, 20):
        write_lora(tmp_path / "run" / f"checkpoint-{step}")
    with pytest.raises(InvalidAdapter, match=r"subfolders \(checkpoint-10, checkpoint-20\): give one of these"):
        open_source(str(tmp_path / "run")).files()
    with pytest.raises(InvalidAdapter, match="belongs to a whole model"):
        open_source(str(write_base(tmp_path / "base"))).files()
    sharded = write_lora(tmp_path / "sharded")
    (sharded / "adapter_model.safetensors").rename(sharded / "adapter_model-00001-of-00001.safetensors")
    with pytest.raises(InvalidAdapter, match="one of several files"):
        open_source(str(sharded)).files()
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceNotFound, match="there is no adapter in"):
        open_source(str(tmp_path / "empty")).files()
    assert open_source(str(tmp_path / "run" / "checkpoint-10")).files()
