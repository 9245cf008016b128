"""Adapters with finite weights that overflow in computation, and a base model with one overflowing token."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from support.models import PAD, make_lora, make_reft

OVERFLOWING_TOKEN = PAD
"""Under `with_overflowing_token`, every request overflows from this token on. Greedy output never has this token."""


def with_overflowing_token(model: Path) -> Path:
    """Gives `OVERFLOWING_TOKEN` an infinite embedding, and a logit of zero. The model's embeddings aren't tied."""
    tensors = load_file(model / "model.safetensors")
    tensors["model.embed_tokens.weight"][OVERFLOWING_TOKEN] = torch.inf
    tensors["lm_head.weight"][OVERFLOWING_TOKEN] = 0.0
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    return model


def _scaled(folder: Path, factor: float, names: Collection[str] = ("",)) -> Path:
    """Multiplies the tensors whose names contain one of `names`."""
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    scaled = {
        name: tensor * factor if any(part in name for part in names) else tensor for name, tensor in tensors.items()
    }
    assert all(torch.isfinite(tensor).all() for tensor in scaled.values())
    save_file(scaled, file, metadata={"format": "pt"})
    return folder


def _with_alpha(folder: Path, alpha: float) -> Path:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"lora_alpha": alpha}))
    return folder


OVERFLOWING: Mapping[str, Callable[[Path, Path], Path]] = {
    "everywhere": lambda folder, model: _scaled(make_lora(folder, model, seed=21), 1e30),
    "alpha": lambda folder, model: _with_alpha(_scaled(make_lora(folder, model, rank=4, seed=22), 1e15), 1e30),
    "values": lambda folder, model: _scaled(make_lora(folder, model, seed=23, target_modules=("v_proj",)), 1e25),
    "keys": lambda folder, model: _scaled(make_lora(folder, model, seed=24, target_modules=("k_proj",)), 1e25),
    "one-layer": lambda folder, model: _scaled(make_lora(folder, model, seed=25), 1e28, ("layers.1.mlp",)),
    "last-layer": lambda folder, model: _scaled(make_lora(folder, model, seed=26), 1e28, ("layers.2.mlp.down_proj",)),
    "reft-bias": lambda folder, model: _scaled(make_reft(folder, model, rank=8, seed=27), 3e38, ("bias",)),
    "reft-source": lambda folder, model: _scaled(
        make_reft(folder, model, "direft", rank=8, seed=28), 1e38, ("source",)
    ),
}
"""By name, a function of folder and model that writes the folder.

The cases: large weights in all linear layers, a large `lora_alpha`, one kind of module, one layer, the layer after
which no KV is made, and ReFT.
"""
