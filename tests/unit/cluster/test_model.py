"""What the cluster must agree on about a base model's folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from preft.cluster.model import SAMPLE_BYTES, SAMPLES, model_identity, with_model_length
from preft.core.errors import ConfigError
from preft.core.settings import Settings


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Two weight files, one with a tensor that is larger than what is read of it."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"max_position_embeddings": 100}))
    save_file({"norm": np.ones(10, np.float32), "none": np.ones(0, np.float32)}, folder / "a.safetensors")
    weights = {"q": np.zeros((SAMPLES * SAMPLE_BYTES, 2), np.float32), "k": np.ones((4, 4), np.float32)}
    save_file(weights, folder / "b.safetensors")
    return folder


def change_tensor(path: Path, name: str, *, shape: tuple[int, ...] | None = None, only: Any = slice(None)) -> None:
    tensors = {key: value.copy() for key, value in load_file(path).items()}
    if shape is None:
        tensors[name].reshape(-1)[only] += 1
    else:
        tensors[name] = tensors[name].reshape(shape)
    save_file(tensors, path)


def test_equal_folders_are_one_model(model: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(model, tmp_path / "copy")
    (copy / "README.md").write_text("something else")
    assert model_identity(copy) == model_identity(model)


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / "config.json").write_text("{}"),
        lambda folder: change_tensor(folder / "a.safetensors", "norm", only=3),
        lambda folder: change_tensor(folder / "b.safetensors", "q"),
        lambda folder: change_tensor(folder / "b.safetensors", "q", only=0),
        lambda folder: change_tensor(folder / "b.safetensors", "q", only=-1),
        lambda folder: change_tensor(folder / "b.safetensors", "q", shape=(2, SAMPLES * SAMPLE_BYTES)),
        lambda folder: change_tensor(folder / "b.safetensors", "k"),
        lambda folder: (folder / "b.safetensors").rename(folder / "c.safetensors"),
        lambda folder: save_file({"v": np.ones(3)}, folder / "c.safetensors"),
        lambda folder: (folder / "a.safetensors").unlink(),
    ],
)
def test_any_difference_is_another_model(model: Path, change: Callable[[Path], Any]) -> None:
    before = model_identity(model)
    change(model)
    assert model_identity(model) != before


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda folder: shutil.rmtree(folder), "is not a model folder: config.json: No such file"),
        (lambda folder: (folder / "config.json").unlink(), "is not a model folder"),
        (lambda folder: (folder / "config.json").write_bytes(b"\xff{"), "is not JSON"),
        (lambda folder: (folder / "config.json").write_text("[]"), "is not a JSON object"),
        (lambda folder: [path.unlink() for path in folder.glob("*.safetensors")], r"holds no .safetensors file"),
        (lambda folder: (folder / "b.safetensors").write_bytes(b"b"), r"b.safetensors: it is not a safetensors file"),
    ],
)
def test_what_is_no_model_is_said(model: Path, change: Callable[[Path], Any], says: str) -> None:
    change(model)
    with pytest.raises(ConfigError, match=f"^model: .*{says}"):
        model_identity(model)


def configured(model: Path, config: dict[str, Any]) -> Path:
    (model / "config.json").write_text(json.dumps(config))
    return model


@pytest.mark.parametrize(
    "config",
    [
        {"max_position_embeddings": 100},
        {"text_config": {"max_position_embeddings": 100}},
        {"max_position_embeddings": 100, "text_config": None},
        {"max_position_embeddings": None, "text_config": {"max_position_embeddings": 100}},
        {"max_position_embeddings": 25, "rope_scaling": {"type": "linear", "factor": 4.0}},
        {"max_position_embeddings": 50, "rope_parameters": {"rope_type": "dynamic", "factor": 2}},
        {"max_position_embeddings": 100, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        {"max_position_embeddings": 100, "rope_scaling": {"type": "yarn", "factor": 8.0}},
        {"max_position_embeddings": 100, "rope_parameters": {"rope_type": "default"}},
        {
            "model_type": "gemma3",
            "text_config": {
                "model_type": "gemma3_text",
                "max_position_embeddings": 100,
                "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            },
        },
    ],
)
def test_the_length_is_the_model_s_own(model: Path, config: dict[str, Any]) -> None:
    settings = Settings(model=configured(model, config), block_size=64)
    filled = with_model_length(settings)
    assert filled.max_model_len == 100
    assert filled == settings.model_copy(update={"max_model_len": 100})
    assert settings.max_model_len is None


def test_a_length_that_is_set_stays(model: Path) -> None:
    for length in (1, 100):
        assert with_model_length(Settings(model=model, max_model_len=length)).max_model_len == length


def test_more_than_the_model_can_do(model: Path) -> None:
    with pytest.raises(ConfigError, match=r"^max_model_len: 101 is more than the model's 100 positions"):
        with_model_length(Settings(model=model, max_model_len=101))


@pytest.mark.parametrize("config", [{}, {"text_config": None}, {"max_position_embeddings": "100"}])
def test_a_model_that_does_not_say(model: Path, config: dict[str, Any]) -> None:
    configured(model, config)
    with pytest.raises(ConfigError, match=r"^max_model_len: .* doesn't say it; set it"):
        with_model_length(Settings(model=model))
    assert with_model_length(Settings(model=model, max_model_len=7)).max_model_len == 7


@pytest.mark.parametrize(
    "config",
    [
        {"text_config": 5},
        {"model_type": 5},
        {"rope_scaling": "yarn"},
        {"rope_scaling": {"type": "linear", "factor": "much"}},
        {"rope_scaling": {"type": "linear", "factor": float("inf")}},
    ],
)
def test_values_of_a_wrong_kind_are_one_sentence(model: Path, config: dict[str, Any]) -> None:
    (model / "config.json").write_text(json.dumps({"max_position_embeddings": 100, **config}))
    with pytest.raises(ConfigError, match=r"config\.json has a value of a wrong kind"):
        with_model_length(Settings(model=model))


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"org/name is not a model folder: .*a model from a hub must be downloaded"):
        with_model_length(Settings(model=tmp_path / "org" / "name"))
