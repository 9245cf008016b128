"""Adapters from shared memory into slots: the very weights of the files, nothing of who was there before."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from preft.adapters.formats.digest import adapter_digest
from preft.adapters.store.packed import AdapterFiles
from preft.core.errors import InvalidAdapter
from preft.engine.adapter_weights import AdapterWeights, LoraPart, read_weights
from preft.engine.lora import GroupedLoRAModelManager, _fill_module
from support.lora_folders import HIDDEN, INTER, PREFIX, VOCAB, lora_config, lora_tensors, write_lora

RANK = 8


def packed(folder: Path) -> memoryview:
    files = AdapterFiles(folder)
    memory = memoryview(bytearray(files.packed_size))
    files.pack(memory, adapter_digest(folder))
    files.close()
    return memory


def place_of(name: str) -> tuple[str, int] | None:
    return (name.replace("q_proj", "qkv_proj"), 0) if name.startswith("model.layers.") else None


def read(memory: memoryview) -> AdapterWeights:
    return read_weights(3, memory, place_of, None, RANK)


def test_tensors_are_views_of_the_memory(tmp_path: Path) -> None:
    memory = packed(write_lora(tmp_path / "ada", lora_config(alpha_pattern={"down_proj": 2})))
    weights = read(memory)
    assert sorted(weights.lora) == sorted(
        f"model.layers.{layer}.{name}" for layer in (0, 1) for name in ("self_attn.qkv_proj", "mlp.down_proj")
    )
    files = load_file(tmp_path / "ada" / "adapter_model.safetensors")
    part = weights.lora["model.layers.1.mlp.down_proj"][0]
    name = "base_model.model.model.layers.1.mlp.down_proj.lora_{}.weight"
    assert torch.equal(part.a, files[name.format("A")])
    assert torch.equal(part.b, files[name.format("B")])
    assert part.scaling == 0.5
    assert weights.lora["model.layers.1.self_attn.qkv_proj"][0].scaling == 2
    assert weights.lora_rank == 4
    memory[:] = bytes(len(memory))
    assert not part.a.any()


@pytest.mark.parametrize("prefix", ["layers", "_orig_mod.base_model.model.model.language_model.layers"])
def test_a_module_s_other_names_are_its_own(tmp_path: Path, prefix: str) -> None:
    """Scales follow patterns in either spelling."""
    plain = lora_tensors()
    renamed = {name.replace(PREFIX, prefix).replace(".weight", ".default.weight"): plain[name] for name in plain}
    config = lora_config(alpha_pattern={r"(language_model\.)?layers\.1\..*": 2})
    expected, found = (
        read(packed(write_lora(tmp_path / name, config, tensors)))
        for name, tensors in (("plain", plain), ("renamed", renamed))
    )
    assert found.lora.keys() == expected.lora.keys()
    for module, [part] in ((name, list(parts.values())) for name, parts in expected.lora.items()):
        other = found.lora[module][0]
        assert torch.equal(part.a, other.a)
        assert torch.equal(part.b, other.b)
        assert part.scaling == other.scaling == (0.5 if "layers.1" in module else 2)


def test_an_output_layer_s_lora_comes_without_the_copies_beside_it(tmp_path: Path) -> None:
    extra = {"lora_A.weight": (4, HIDDEN), "lora_B.weight": (VOCAB, 4), "base_layer.weight": (VOCAB, HIDDEN)}
    tensors = {f"base_model.model.lm_head.{name}": np.ones(shape, np.float32) for name, shape in extra.items()}
    tensors["base_model.model.model.embed_tokens.weight"] = np.ones((VOCAB, HIDDEN), np.float32)
    memory = packed(write_lora(tmp_path / "ada", lora_config(), {**lora_tensors(), **tensors}))
    weights = read_weights(3, memory, lambda name: (name, 0), None, RANK)
    assert len(weights.lora) == 5
    assert weights.lora["lm_head"][0].b.shape == (VOCAB, 4)
    assert weights.head_rank == 4
    assert read(packed(write_lora(tmp_path / "bob"))).head_rank == 0
    del tensors["base_model.model.lm_head.lora_B.weight"]
    memory = packed(write_lora(tmp_path / "bob", lora_config(), {**lora_tensors(), **tensors}))
    with pytest.raises(ValueError, match="lm_head has one side of a LoRA alone"):
        read_weights(3, memory, lambda name: (name, 0), None, RANK)
    memory = packed(write_lora(tmp_path / "bob", lora_config(), {"q.lora_A.weight": np.ones((4, 4), np.float32)}))
    with pytest.raises(ValueError, match=r"q\.lora_A\.weight is no LoRA tensor"):
        read(memory)


def test_what_the_model_has_no_place_for_is_refused(tmp_path: Path) -> None:
    memory = packed(write_lora(tmp_path / "ada"))
    with pytest.raises(ValueError, match=r"takes no LoRA on model\.layers\.\d\."):
        read_weights(3, memory, lambda name: None, None, RANK)
    with pytest.raises(InvalidAdapter, match="more than the largest served rank 1"):
        read_weights(3, memory, place_of, None, 1)
    with pytest.raises(InvalidAdapter):
        read(memoryview(bytearray(100)))


def module(slots: int = 2, slices: int = 2) -> SimpleNamespace:
    """Stacks of a packed layer, full of what others have left."""
    a = tuple(torch.randn(slots, 1, RANK, HIDDEN) for _ in range(slices))
    b = tuple(torch.randn(slots, 1, INTER, RANK) for _ in range(slices))
    return SimpleNamespace(tp_size=1, lora_a_stacked=a, lora_b_stacked=b)


def test_a_slot_holds_the_adapter_and_zeros_up_to_the_rank_that_is_read() -> None:
    layer = module()
    others = [stack[0].clone() for stack in (*layer.lora_a_stacked, *layer.lora_b_stacked)]
    part = LoraPart(torch.randn(3, HIDDEN), torch.randn(INTER, 3), 0.25)
    kept = part.b.clone()
    _fill_module(layer, 1, RANK, {1: part})
    a, b = layer.lora_a_stacked[1][1, 0], layer.lora_b_stacked[1][1, 0]
    assert torch.equal(a[:3], part.a)
    assert torch.equal(b[:, :3], 0.25 * kept)
    assert torch.equal(part.b, kept)  # it is others' too
    assert not a[3:].any()
    assert not b[:, 3:].any()
    assert not layer.lora_a_stacked[0][1].any()  # the slice that it doesn't adapt
    assert not layer.lora_b_stacked[0][1].any()
    for stack, other in zip((*layer.lora_a_stacked, *layer.lora_b_stacked), others, strict=True):
        assert torch.equal(stack[0], other)


def test_an_adapter_that_left_its_slot_never_comes_back_empty() -> None:
    manager = object.__new__(GroupedLoRAModelManager)
    weights = AdapterWeights(7, {"q": {0: LoraPart(torch.zeros(1, 1), torch.zeros(1, 1), 1.0)}})
    weights.drop()
    manager._registered_adapters = SimpleNamespace(cache={7: weights})
    manager._active_adapters = {}
    with pytest.raises(RuntimeError, match="has left its slot"):
        manager.activate_adapter(7)
