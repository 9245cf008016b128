"""Each spelling of a module's name means that module; what is only half known means none."""

from __future__ import annotations

from pathlib import Path

import pytest

from preft.adapters.formats.base_model import BaseModel, read_base_model
from preft.adapters.formats.folder import check_adapter
from preft.adapters.formats.tensor_names import read_base_name, read_lora_name
from preft.core.errors import InvalidAdapter
from support.lora_folders import PREFIX, lora_config, lora_tensors, write_base, write_lora

PLAIN = "model.layers.1.mlp.up_proj"
SPELLINGS = (  # of PREFIX
    "model.layers",
    "layers",
    "base_model.model.layers",
    "base_model.model.base_model.model.model.layers",
    "module.base_model.model.model.layers",
    "_orig_mod.base_model.model.model.layers",
    "base_model.model._orig_mod.model.layers",
    "_fsdp_wrapped_module.base_model.model.model._fsdp_wrapped_module.layers",
    "module._orig_mod._checkpoint_wrapped_module.base_model.model.model.layers",
    "base_model.model.model.language_model.layers",
    "base_model.model.language_model.model.layers",
    "language_model.model.layers",
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    return read_base_model(write_base(tmp_path_factory.mktemp("base")))


@pytest.mark.parametrize("prefix", SPELLINGS)
@pytest.mark.parametrize("adapter", ["", ".default", ".my-adapter_2"])
def test_one_meaning(prefix: str, adapter: str) -> None:
    tensor = read_lora_name(f"{prefix}.1._orig_mod.mlp._fsdp_wrapped_module.up_proj.lora_B{adapter}.weight")
    assert tensor is not None
    assert (tensor.module, tensor.side, tensor.adapter) == (PLAIN, "B", adapter.removeprefix("."))
    assert read_base_name(f"{prefix}.1.mlp.up_proj.weight") is None


@pytest.mark.parametrize(
    "name", ["lm_head", "base_model.model.lm_head", "module.base_model.model.language_model.lm_head"]
)
def test_the_output_layer(name: str) -> None:
    tensor = read_lora_name(f"{name}.lora_A.weight")
    assert tensor is not None
    assert (tensor.module, tensor.side) == ("lm_head", "A")
    assert read_base_name(f"{name}.base_layer.weight") == read_base_name(f"{name}.weight") == "lm_head"


@pytest.mark.parametrize(
    "name",
    [
        "base_model.model.model.visual.layers.0.mlp.up_proj.lora_A.weight",
        "base_model.model.my_orig_mod.layers.0.mlp.up_proj.lora_A.weight",
        "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight",
        "base_model.model.model.layers.0.mlp.up_proj.lora_C.weight",
        "base_model.model.model.layers.0.mlp.up_proj.lora_A.bias",
        "base_model.model.model.layers.0.mlp.up_proj.lora_A.a.b.weight",
        "base_model.model.model.layers.00.mlp.up_proj.lora_A.weight",
        "base_model.model.model.layers.0.mlp.up_proj.lora_A",
        "layers.lora_A.weight",
        "",
    ],
)
def test_half_known_names_mean_nothing(name: str) -> None:
    assert read_lora_name(name) is None
    assert read_base_name(name) is None


@pytest.mark.parametrize("prefix", SPELLINGS)
def test_a_folder_with_any_spelling_passes(tmp_path: Path, base: BaseModel, prefix: str) -> None:
    tensors = {
        name.replace(PREFIX, prefix).replace(".weight", ".default.weight"): tensor
        for name, tensor in lora_tensors().items()
    }
    assert check_adapter(write_lora(tmp_path / "a", tensors=tensors), base, 8).rank == 4


def test_patterns_may_use_the_names_of_the_model_that_was_trained(tmp_path: Path, base: BaseModel) -> None:
    spelling = "model.language_model.layers"
    tensors = {name.replace("model.layers", spelling): tensor for name, tensor in lora_tensors().items()}
    config = lora_config(target_modules=r"model\.language_model\.layers\.\d\.(self_attn\.q|mlp\.down)_proj")
    assert check_adapter(write_lora(tmp_path / "a", config, tensors), base, 8).rank == 4
    del tensors[f"base_model.model.{spelling}.1.mlp.down_proj.lora_A.weight"]
    del tensors[f"base_model.model.{spelling}.1.mlp.down_proj.lora_B.weight"]
    with pytest.raises(InvalidAdapter, match=r"adapts model\.layers\.1\.mlp\.down_proj"):
        check_adapter(write_lora(tmp_path / "b", config, tensors), base, 8)


def test_two_tensors_of_one_meaning_are_refused(tmp_path: Path, base: BaseModel) -> None:
    tensors = lora_tensors()
    name = f"{PREFIX}.0.self_attn.q_proj.lora_A.weight"
    tensors[f"module.{name}"] = tensors[name]
    with pytest.raises(InvalidAdapter, match=r"is there twice: .*q_proj\.lora_A\.weight is lora_A of model\.layers\.0"):
        check_adapter(write_lora(tmp_path / "a", tensors=tensors), base, 8)
