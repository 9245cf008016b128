"""Synthetic adapters: accepted by the server's own checks, equal for equal seeds, for any base model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from preft.adapters.formats.reft_format import BIAS, ROTATE, SOURCE
from preft_loadgen.errors import InvalidArgument
from preft_loadgen.synthetic import BaseShape, Kind, make_adapters, read_shape

CONFIG = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
}


def model(folder: Path, config: Any = None, **tensors: tuple[int, ...]) -> Path:
    (folder / "config.json").write_text(json.dumps(CONFIG if config is None else config))
    if tensors:
        weights = {name.replace("__", "."): np.zeros(shape, np.float16) for name, shape in tensors.items()}
        save_file(weights, folder / "model.safetensors")
    return folder


def make(
    folder: Path, kind: Kind, count: int = 2, rank: int = 3, seed: int = 0, step: Callable[[], Any] = int
) -> list[Path]:
    shape = read_shape(model(folder)) if (folder.mkdir(exist_ok=True) or True) else None
    assert shape is not None
    return make_adapters(shape, folder / "adapters", count=count, kind=kind, rank=rank, seed=seed, step=step)


def test_shapes_from_the_config(tmp_path: Path) -> None:
    shape = read_shape(model(tmp_path))
    assert (shape.hidden, shape.layers, len(shape.linears)) == (16, 2, 14)
    assert shape.linears["model.layers.1.self_attn.k_proj"] == (8, 16)
    assert shape.linears["model.layers.0.mlp.down_proj"] == (16, 24)


def test_shapes_from_the_weights(tmp_path: Path) -> None:
    nested = {"text_config": {**CONFIG, "head_dim": 99}}
    tensors = {
        "language_model__model__layers__0__self_attn__q_proj__weight": (32, 16),
        "language_model__model__layers__0__mlp__gate_up_proj__weight": (48, 16),
        "language_model__model__layers__0__self_attn__q_proj__bias": (32,),
        "language_model__model__embed_tokens__weight": (99, 16),
        "vision_tower__layers__0__self_attn__q_proj__weight": (7, 7),
        "model__layers__0__mlp__experts__3__up_proj__weight": (8, 8),
    }
    shape = read_shape(model(tmp_path, nested, **tensors))
    assert shape.linears == {
        "language_model.model.layers.0.self_attn.q_proj": (32, 16),
        "language_model.model.layers.0.mlp.gate_up_proj": (48, 16),
    }


def test_a_lora(tmp_path: Path) -> None:
    steps: list[int] = []
    first, second = make(tmp_path, Kind.LORA, step=lambda: steps.append(1))
    assert (first.name, second.name, len(steps)) == ("lora-0000", "lora-0001", 2)
    config = json.loads((first / "adapter_config.json").read_text())
    assert (config["r"], config["prefill_only"], len(config["target_modules"])) == (3, True, 7)
    tensors = load_file(first / "adapter_model.safetensors")
    assert len(tensors) == 2 * 14
    assert tensors["base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight"].shape == (3, 16)
    assert tensors["base_model.model.model.layers.0.self_attn.k_proj.lora_B.weight"].shape == (8, 3)
    assert all(np.isfinite(tensor).all() and tensor.any() for tensor in tensors.values())


@pytest.mark.parametrize("kind", [Kind.LOREFT, Kind.DIREFT])
def test_a_reft(tmp_path: Path, kind: Kind) -> None:
    folder = make(tmp_path, kind)[0]
    config = json.loads((folder / "reft_config.json").read_text())
    assert (config["method"], config["r"], config["layers"]) == (kind, 3, [0, 1])
    tensors = load_file(folder / "reft_model.safetensors")
    assert set(tensors) == {f"layers.{layer}.{part}" for layer in (0, 1) for part in (ROTATE, SOURCE, BIAS)}
    rotate = tensors[f"layers.1.{ROTATE}"]
    assert rotate @ rotate.T == pytest.approx(np.eye(3), abs=1e-5)


@pytest.mark.parametrize("kind", list(Kind))
def test_equal_seeds_equal_adapters(tmp_path: Path, kind: Kind) -> None:
    def files(folder: Path, **how: Any) -> list[bytes]:
        made = make(tmp_path / folder, kind, **how)
        return [next(path.glob("*.safetensors")).read_bytes() for path in made]

    first = files(Path("x"))
    assert files(Path("y"), count=1) == first[:1]  # a further adapter changes none before it
    assert files(Path("z"), seed=1) != first
    assert first[0] != first[1]


@pytest.mark.parametrize(
    ("config", "message"),
    [({}, "hidden_size"), ([], "hidden_size"), ({**CONFIG, "num_attention_heads": None}, "isn't")],
)
def test_models_that_are_not_known(tmp_path: Path, config: Any, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        read_shape(model(tmp_path, config))


def test_folders_and_numbers_that_are_wrong(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="can't be read"):
        read_shape(tmp_path / "missing")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InvalidArgument, match="isn't JSON"):
        read_shape(tmp_path)
    model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(InvalidArgument, match="safetensors"):
        read_shape(tmp_path)
    shape = BaseShape(16, 1, {})
    for count, rank in ((0, 1), (1, 0), (1, 17), (1_000_000, 1)):
        with pytest.raises(InvalidArgument):
            make_adapters(shape, tmp_path / "a", count=count, kind=Kind.LOREFT, rank=rank, seed=0, step=int)
    with pytest.raises(InvalidArgument, match="can't be written"):
        make_adapters(shape, tmp_path / "config.json", count=1, kind=Kind.LOREFT, rank=1, seed=0, step=int)
