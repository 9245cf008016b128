"""Every way a LoRA folder can be wrong is refused with one sentence that names the file and the field or tensor."""

from __future__ import annotations

import dataclasses
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from preft.adapters.formats.base_model import BaseModel, read_base_model
from preft.adapters.formats.folder import check_adapter
from preft.adapters.formats.peft_config import LORA_GA_WARNING
from preft.adapters.formats.tensor_file import read_entries
from preft.adapters.sources.source import open_source
from preft.core.errors import InvalidAdapter
from support.lora_folders import HIDDEN, KV, PREFIX, VOCAB, lora_config, lora_tensors, write_base, write_lora

Q0 = f"{PREFIX}.0.self_attn.q_proj"
MAX_RANK = 8


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    return read_base_model(write_base(tmp_path_factory.mktemp("base")))


def check(folder: Path, base: BaseModel) -> int:
    open_source(str(folder)).files()  # as whoever copies an adapter does first
    return check_adapter(folder, base, MAX_RANK).rank


def with_tensors(**changes: Any) -> dict[str, Any]:
    """The valid tensors with A and B of layer 0's q_proj replaced (None: left out)."""
    tensors: dict[str, Any] = lora_tensors()
    for side, value in changes.items():
        tensors[f"{Q0}.lora_{side}.weight"] = value
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def ones(*shape: int) -> Any:
    return np.ones(shape, np.float32)


def poisoned(value: float, dtype: Any = np.float32) -> Any:
    array = np.ones((4, HIDDEN), dtype)
    array[3, HIDDEN - 1] = value
    return array


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_good_folder_passes(tmp_path: Path, base: BaseModel, dtype: Any) -> None:
    folder = write_lora(tmp_path / "a", tensors=lora_tensors(dtype=dtype))
    assert check(folder, base) == 4


def test_names_without_peft_prefix_pass(tmp_path: Path, base: BaseModel) -> None:
    tensors = {name.removeprefix("base_model.model."): tensor for name, tensor in lora_tensors().items()}
    assert check(write_lora(tmp_path / "a", tensors=tensors), base) == 4


@pytest.mark.parametrize(
    "changes",
    [
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": False},
        {"use_rslora": True},
        {"target_modules": r".*\.(q|down)_proj"},
        {"target_modules": ["mlp.down_proj", "self_attn.q_proj", "a_module_that_is_not_there"]},
        {"target_modules": "all-linear", "exclude_modules": ["k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"]},
        {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}, "loftq_config": {}, "velora_config": {"scale": 2.0}},
        {"lora_dropout": 0.1, "runtime_config": {"ephemeral_gpu_offload": False}, "megatron_core": "megatron.core"},
        {"a_field_of_tomorrow": None, "another": False, "a_list": []},
        {"lora_alpha": 0.5},
        {"rank_pattern": None, "alpha_pattern": None},
        {"rank_pattern": {"v_proj": 8}},
        {"alpha_pattern": {"q_proj": 3}},
        {"layers_to_transform": [0, 1]},
        {"layers_to_transform": [0, 1], "layers_pattern": "layers"},
    ],
    ids=str,
)
def test_harmless_settings_pass(tmp_path: Path, base: BaseModel, changes: dict[str, Any]) -> None:
    check(write_lora(tmp_path / "a", lora_config(**changes)), base)


@pytest.mark.parametrize("pattern", ["q_proj", "layers.0.self_attn.q_proj", r"layers\.[01]\.self_attn\.q_proj"])
def test_a_rank_pattern_is_understood(tmp_path: Path, base: BaseModel, pattern: str) -> None:
    tensors = with_tensors(A=ones(8, HIDDEN), B=ones(HIDDEN, 8))
    if "0" not in pattern or "1" in pattern:
        other = Q0.replace(".0.", ".1.")
        tensors |= {f"{other}.lora_A.weight": ones(8, HIDDEN), f"{other}.lora_B.weight": ones(HIDDEN, 8)}
    folder = write_lora(tmp_path / "a", lora_config(rank_pattern={pattern: 8}), tensors)
    assert check(folder, base) == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "REFT"}, "peft_type is 'REFT', only 'LORA'"),
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
        ({"peft_type": None}, "peft_type is None"),
        ({"r": 0}, "r is 0"),
        ({"r": -4}, "r is -4"),
        ({"r": True}, "r is True"),
        ({"r": "4"}, "r is '4'"),
        ({"r": None}, "r is None"),
        ({"r": 9}, "r is 9, more than the largest served rank 8"),
        ({"rank_pattern": {"q_proj": 9}}, r"rank_pattern\['q_proj'\] is 9, more"),
        ({"rank_pattern": {"q_proj": 0}}, r"rank_pattern\['q_proj'\] is 0"),
        ({"rank_pattern": {"(": 4}}, "not a valid pattern"),
        ({"rank_pattern": {"(([a-z_.0-9])+)+!": 4}}, "take more than 1 s to match"),
        ({"alpha_pattern": {"(.|[^A-Z])" * 24 + "!": 4}}, "take more than 1 s to match"),
        ({"rank_pattern": [4]}, "rank_pattern is not an object"),
        ({"alpha_pattern": {"q_proj": "x"}}, r"alpha_pattern\['q_proj'\]"),
        ({"lora_alpha": None}, "lora_alpha is None"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"lora_alpha": 10**400}, "lora_alpha is 1000"),
        ({"target_modules": None}, "target_modules is missing"),
        ({"target_modules": []}, "target_modules is missing"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"use_dora": True}, "use_dora.*DoRA"),
        ({"use_qalora": True}, "use_qalora"),
        ({"use_bdlora": {"nblocks": 2}}, "use_bdlora"),
        ({"use_something_new": True}, "use_something_new is set"),
        ({"kasa_config": {"beta": 1e-4}}, "kasa_config is set, and KaSA"),
        ({"kasa_config": {}}, "kasa_config is set"),  # PEFT takes it for its defaults
        ({"monteclora_config": {"num_samples": 4}}, "monteclora_config is set"),
        ({"megatron_config": {"tp": 2}}, "megatron_config is set"),
        ({"arrow_config": {"top_k": 2}}, "arrow_config is set"),
        ({"some_other_config": {}}, "some_other_config is set, which is unknown"),
        ({"scale_b": 0.5}, "scale_b is set, which is unknown"),
        ({"use_rslora": "yes"}, "use_rslora is 'yes'"),
        ({"init_lora_weights": "lora_of_tomorrow"}, "lora_of_tomorrow', which is unknown"),
        ({"init_lora_weights": ["pissa"]}, "init_lora_weights is"),
        ({"target_modules": "("}, "target_modules is '\\(', which is not a valid pattern"),
        ({"target_modules": 3}, "target_modules is 3"),
        ({"target_modules": "(([a-z_.0-9])+)+!"}, "take more than 1 s to match"),
        ({"exclude_modules": "(([a-z_.0-9])+)+!"}, "take more than 1 s to match"),
        ({"exclude_modules": {"q_proj": 1}}, "exclude_modules is"),
        ({"layers_to_transform": ["0"]}, "layers_to_transform is"),
        ({"layers_to_transform": [0], "target_modules": ".*q_proj"}, "need a list as target_modules"),
        ({"layers_pattern": "layers"}, "layers_pattern needs layers_to_transform"),
        ({"layers_to_transform": [0], "layers_pattern": "(a|b)*"}, "layers_pattern is"),
        ({"lora_bias": True}, "lora_bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"alora_invocation_tokens": [3]}, "alora_invocation_tokens"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"target_parameters": ["experts.w"]}, "target_parameters"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"init_lora_weights": "pissa_niter_16"}, "pissa_niter_16"),
        ({"init_lora_weights": "olora"}, "olora"),
        ({"init_lora_weights": "corda"}, "corda"),
        ({"init_lora_weights": "loftq"}, "loftq"),
    ],
    ids=str,
)
def test_a_bad_config_is_refused(tmp_path: Path, base: BaseModel, changes: dict[str, Any], message: str) -> None:
    folder = write_lora(tmp_path / "a", lora_config(**changes))
    with pytest.raises(InvalidAdapter, match=message) as caught:
        check(folder, base)
    assert "adapter_config.json" in str(caught.value)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "holds no tensors"),
        (with_tensors(B=None), "q_proj has a lora_A but no lora_B"),
        (with_tensors(A=None), "q_proj has a lora_B but no lora_A"),
        (with_tensors(A=ones(4, HIDDEN + 1)), "17 inputs and 16 outputs, but the base model has 16 and 16"),
        (with_tensors(B=ones(KV, 4)), "16 inputs and 8 outputs, but the base model has 16 and 16"),
        (with_tensors(A=ones(3, HIDDEN)), "rank 3 in lora_A but 4 in lora_B"),
        (with_tensors(A=ones(3, HIDDEN), B=ones(HIDDEN, 3)), "has rank 3, but adapter_config.json says 4"),
        (with_tensors(A=ones(9, HIDDEN), B=ones(HIDDEN, 9)), "has rank 9, served are ranks 1 to 8"),
        (with_tensors(A=ones(0, HIDDEN), B=ones(HIDDEN, 0)), "has rank 0"),
        (with_tensors(A=ones(HIDDEN)), "has 1 dimensions, not 2"),
        (with_tensors(A=poisoned(np.nan)), "q_proj.lora_A.weight holds an infinite value or NaN"),
        (with_tensors(A=poisoned(-np.inf)), "q_proj.lora_A.weight holds an infinite"),
        (with_tensors(A=poisoned(np.inf, np.float16)), "q_proj.lora_A.weight holds an infinite"),
        (with_tensors(A=np.ones((4, HIDDEN), np.float64)), "is F64, only F32, F16, BF16"),
        (with_tensors(A=np.ones((4, HIDDEN), np.int8)), "is I8"),
        ({f"{PREFIX}.2.self_attn.q_proj.lora_A.weight": ones(4, HIDDEN)}, "layer 2, but .* layers are 0 to 1"),
        ({"base_model.model.lm_head.lora_A.weight": ones(4, HIDDEN)}, "lm_head has a lora_A but no lora_B"),
        (
            {"base_model.model.score.lora_A.weight": ones(4, HIDDEN)},
            "adapts score, but only q_proj, .* and lm_head can",
        ),
        ({"base_model.model.visual.layers.0.mlp.up_proj.lora_A.weight": ones(4, HIDDEN)}, "adapts visual.*, but only"),
        ({f"{PREFIX}.0.self_attn.qkv_proj.lora_A.weight": ones(4, HIDDEN)}, "adapts .*qkv_proj, but only"),
        ({f"{PREFIX}.0.mlp.q_proj.lora_A.weight": ones(4, HIDDEN)}, "mlp.q_proj, which the base model doesn't have"),
        ({f"{PREFIX}.0.self_attn.q_proj.weight": ones(HIDDEN, HIDDEN)}, "is not a lora_A or lora_B weight"),
        ({f"{Q0}.lora_magnitude_vector": ones(HIDDEN)}, "is not a lora_A or lora_B weight"),
        ({"base_model.model.model.embed_tokens.lora_embedding_A": ones(4, 32)}, "adapts the embedding, but only"),
        (
            {**lora_tensors(), f"{Q0.removeprefix('base_model.model.')}.lora_A.weight": ones(4, HIDDEN)},
            "is there twice",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_tensors_are_refused(tmp_path: Path, base: BaseModel, tensors: dict[str, Any], message: str) -> None:
    folder = write_lora(tmp_path / "a", tensors=tensors)
    with pytest.raises(InvalidAdapter, match=message) as caught:
        check(folder, base)
    assert "adapter_model.safetensors" in str(caught.value)


@pytest.mark.parametrize(("bits", "finite"), [(0x3F80, True), (0x7F7F, True), (0x7F80, False), (0xFF80, False)])
def test_bfloat16_is_read_bit_by_bit(tmp_path: Path, base: BaseModel, bits: int, finite: bool) -> None:
    folder = write_lora(tmp_path / "a")
    header, content = {}, b""
    for name, tensor in lora_tensors().items():
        raw = np.full(tensor.shape, 0x3F80, "<u2")
        raw[-1, -1] = bits
        offsets = [len(content), len(content) + raw.nbytes]
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": offsets}
        content += raw.tobytes()
    encoded = json.dumps(header).encode()
    file = len(encoded).to_bytes(8, "little") + encoded + content
    (folder / "adapter_model.safetensors").write_bytes(file)
    if finite:
        check(folder, base)
    else:
        with pytest.raises(InvalidAdapter, match="infinite value or NaN"):
            check(folder, base)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers_to_transform": [0]}, r"holds a LoRA of model\.layers\.1\.mlp\.down_proj, which adapter_config\.json"),
        ({"layers_to_transform": 1, "layers_pattern": ["layers"]}, r"holds a LoRA of model\.layers\.0"),
        ({"layers_to_transform": [0, 1], "layers_pattern": "h"}, "holds a LoRA of model"),
        ({"target_modules": ["q_proj"]}, r"holds a LoRA of model\.layers\.0\.mlp\.down_proj"),
        ({"target_modules": "q_proj|down_proj"}, "holds a LoRA of"),  # a pattern is of whole names
        ({"exclude_modules": ["layers.1.self_attn.q_proj"]}, r"holds a LoRA of model\.layers\.1\.self_attn\.q_proj"),
        ({"exclude_modules": r".*down_proj"}, r"holds a LoRA of model\.layers\.0\.mlp\.down_proj"),
        (
            {"target_modules": ["q_proj", "down_proj", "v_proj"]},
            r"adapts model\.layers\.0\.self_attn\.v_proj, .*no LoRA",
        ),
        ({"target_modules": "all-linear"}, r"adapts model\.layers\.0\.mlp\.gate_proj, .*holds no LoRA"),
        ({"target_modules": ["q_proj", "down_proj", "lm_head"]}, "adapts lm_head, .*holds no LoRA"),
    ],
    ids=str,
)
def test_a_config_of_other_modules_than_the_tensors_is_refused(
    tmp_path: Path, base: BaseModel, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidAdapter, match=message):
        check(write_lora(tmp_path / "a", lora_config(**changes)), base)


def head(rank: int = 4, rows: int = VOCAB) -> dict[str, Any]:
    prefix = "base_model.model.lm_head.lora_"
    return {f"{prefix}A.weight": ones(rank, HIDDEN), f"{prefix}B.weight": ones(rows, rank)}


def test_the_output_layer_takes_a_lora(tmp_path: Path, base: BaseModel) -> None:
    config = lora_config(target_modules=["q_proj", "down_proj", "lm_head"], rank_pattern={"lm_head": 7})
    assert check(write_lora(tmp_path / "a", config, lora_tensors() | head(7)), base) == 7
    with pytest.raises(InvalidAdapter, match=r"lm_head is adapted as 16 inputs and 33 outputs, but .* 16 and 32"):
        check(write_lora(tmp_path / "b", config, lora_tensors() | head(7, rows=VOCAB + 1)), base)
    tied = {**config, "ensure_weight_tying": True}
    with pytest.raises(InvalidAdapter, match="ensure_weight_tying is set"):
        check(write_lora(tmp_path / "c", tied, lora_tensors() | head(7)), base)
    other = dataclasses.replace(
        base, modules={name: shape for name, shape in base.modules.items() if name != "lm_head"}
    )
    with pytest.raises(InvalidAdapter, match="adapts lm_head, but only"):
        check(write_lora(tmp_path / "d", config, lora_tensors() | head(7)), other)


@pytest.mark.parametrize("name", ["lm_head.base_layer.weight", "model.embed_tokens.weight"])
def test_copies_of_the_base_model_s_embedding_must_be_equal(tmp_path: Path, base: BaseModel, name: str) -> None:
    """PEFT saves them beside a LoRA on the output layer, and loads them into the model."""
    config = lora_config(target_modules=["q_proj", "down_proj", "lm_head"])

    def folder(copy: Any) -> Path:
        return write_lora(tmp_path / "a", config, {**lora_tensors(), **head(), f"base_model.model.{name}": copy})

    assert check(folder(np.zeros((VOCAB, HIDDEN), np.float32)), base) == 4
    assert any("save_embedding_layers=False" in one for one in check_adapter(tmp_path / "a", base, MAX_RANK).warnings)
    changed = np.zeros((VOCAB, HIDDEN), np.float32)
    changed[VOCAB - 1, HIDDEN - 1] = 0.5
    with pytest.raises(InvalidAdapter, match=rf"tensor base_model\.model\.{name} differs from the base model's"):
        check(folder(changed), base)
    with pytest.raises(InvalidAdapter, match="a vocabulary of their own"):
        check(folder(np.zeros((VOCAB + 1, HIDDEN), np.float16)), base)


def test_lora_ga_is_warned_of(tmp_path: Path, base: BaseModel) -> None:
    config = lora_config(init_lora_weights="lora_ga", lora_ga_config={"stable_gamma": 16}, prefill_only=True)
    folder = write_lora(tmp_path / "a", config)
    assert check_adapter(folder, base, MAX_RANK).warnings == (LORA_GA_WARNING,)


def remove_config(folder: Path) -> None:
    (folder / "adapter_config.json").unlink()


def remove_weights(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()


def only_pickle(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def not_json(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{'r': 4")


def binary_config(folder: Path) -> None:
    (folder / "adapter_config.json").write_bytes(b"\xff\xfe\x00")


def deep_json(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("[" * 100_000)


def list_config(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("[]")


def cut_weights(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    os.truncate(path, path.stat().st_size - 1)


def cut_header(folder: Path) -> None:
    os.truncate(folder / "adapter_model.safetensors", 20)


def empty_weights(folder: Path) -> None:
    (folder / "adapter_model.safetensors").write_bytes(b"")


def other_weights(folder: Path) -> None:
    (folder / "adapter_model.safetensors").write_bytes(b"PK\x03\x04" + b"\0" * 200)


def weights_are_a_folder(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.safetensors").mkdir()


def weights_are_a_pipe(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    os.mkfifo(folder / "adapter_model.safetensors")


def dangling_link(folder: Path) -> None:
    (folder / "adapter_config.json").unlink()
    (folder / "adapter_config.json").symlink_to(folder / "nowhere")


def reft_beside(folder: Path) -> None:
    (folder / "reft_config.json").write_text("{}")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove_config, r"adapter_config\.json is missing"),
        (remove_weights, r"adapter_model\.safetensors is missing"),
        (only_pickle, r"adapter_model\.bin .* is a pickle file"),
        (not_json, r"adapter_config\.json is not valid JSON"),
        (binary_config, r"adapter_config\.json is not valid JSON"),
        (deep_json, r"adapter_config\.json is not valid JSON"),
        (list_config, r"adapter_config\.json is not a JSON object"),
        (cut_weights, r"adapter_model\.safetensors: it has .* cut short"),
        (cut_header, r"adapter_model\.safetensors: it is not a safetensors file, or cut short"),
        (empty_weights, r"adapter_model\.safetensors: it is not a safetensors file, or cut short"),
        (other_weights, r"adapter_model\.safetensors: it is not a safetensors file"),
        (weights_are_a_folder, r"adapter_model\.safetensors .* is not a regular file"),
        (weights_are_a_pipe, r"adapter_model\.safetensors .* is not a regular file"),
        (dangling_link, r"adapter_config\.json is missing"),
        (reft_beside, r"reft_model\.safetensors is missing"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_damaged_folder_is_refused(
    tmp_path: Path, base: BaseModel, damage: Callable[[Path], None], message: str
) -> None:
    folder = write_lora(tmp_path / "a")
    damage(folder)
    with pytest.raises(InvalidAdapter, match=message):
        check(folder, base)


def test_a_pickle_beside_safetensors_is_ignored(tmp_path: Path, base: BaseModel) -> None:
    folder = write_lora(tmp_path / "a")
    (folder / "adapter_model.bin").write_bytes(b"pickle")
    check(folder, base)


def test_layers_without_a_readable_shape_take_no_adapter(tmp_path: Path) -> None:
    folder = write_base(tmp_path / "base")
    packed = {"model.layers.0.self_attn.q_proj.weight": np.zeros((HIDDEN, HIDDEN // 2), np.uint8)}
    save_file(packed, folder / "model.safetensors")
    with pytest.raises(InvalidAdapter, match="which the base model doesn't have"):
        check(write_lora(tmp_path / "a"), read_base_model(folder))


def test_tensors_of_two_adapters_are_refused(tmp_path: Path, base: BaseModel) -> None:
    tensors = lora_tensors()
    for name in list(tensors)[:2]:
        tensors[name.replace(".weight", ".default.weight")] = tensors.pop(name)
    with pytest.raises(InvalidAdapter, match=r"of more than one adapter \('' and 'default'\)"):
        check(write_lora(tmp_path / "a", tensors=tensors), base)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("targets", ["all-linear", ["v_proj", "lm_head"]], ids=str)
def test_a_folder_that_peft_saved_passes(tmp_path: Path, targets: Any, tied: bool) -> None:
    """In the type that it was trained in, with what PEFT saves beside a LoRA on the output layer."""
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    small = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": tied}
    model = transformers.AutoModelForCausalLM.from_config(transformers.Qwen2Config(**small, **heads))
    model.save_pretrained(str(tmp_path / "base"))
    lora = peft.LoraConfig(r=4, target_modules=targets, rank_pattern={"v_proj": 2}, task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about merging, and about what is saved beside the LoRA
        peft.get_peft_model(model.to(torch.bfloat16), lora).save_pretrained(str(tmp_path / "a"))
    written = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert written["rank_pattern"] == {"v_proj": 2}
    assert check(tmp_path / "a", read_base_model(tmp_path / "base")) == 4
    copies = [name for name in read_entries(tmp_path / "a" / "adapter_model.safetensors") if "base_layer" in name]
    assert len(copies) == (targets != "all-linear")
