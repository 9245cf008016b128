"""Small folders of a base model and LoRAs, made with numpy alone, easy to break in one place."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

LAYERS, HIDDEN, KV, INTER, VOCAB = 2, 16, 8, 24, 32
SHAPES = {  # outputs, inputs
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KV, HIDDEN),
    "self_attn.v_proj": (KV, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INTER, HIDDEN),
    "mlp.up_proj": (INTER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTER),
}
PREFIX = "base_model.model.model.layers"


def write_base(folder: Path) -> Path:
    """A Llama-shaped base model: its config and float16 zeros."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"model.layers.{layer}.{name}.weight": np.zeros(shape, np.float16)
        for layer in range(LAYERS)
        for name, shape in SHAPES.items()
    }
    tensors["model.embed_tokens.weight"] = np.zeros((VOCAB, HIDDEN), np.float16)
    tensors["model.norm.weight"] = np.zeros(HIDDEN, np.float16)
    save_file(tensors, folder / "model.safetensors")
    config = {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": LAYERS, "hidden_size": HIDDEN}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def lora_config(rank: int = 4, **changes: Any) -> dict[str, Any]:
    """A config in PEFT's form, with `changes` on top."""
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "base",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": ["q_proj", "down_proj"],
        "bias": "none",
        "use_dora": False,
        "use_rslora": False,
        "modules_to_save": None,
        "init_lora_weights": True,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    return {**config, **changes}


def lora_tensors(rank: int = 4, seed: int = 0, dtype: Any = np.float32) -> dict[str, np.ndarray[Any, Any]]:
    """A and B for q_proj and down_proj of every layer."""
    generator = np.random.default_rng(seed)
    tensors = {}
    for layer in range(LAYERS):
        for name in ("self_attn.q_proj", "mlp.down_proj"):
            outputs, inputs = SHAPES[name]
            tensors[f"{PREFIX}.{layer}.{name}.lora_A.weight"] = generator.normal(size=(rank, inputs)).astype(dtype)
            tensors[f"{PREFIX}.{layer}.{name}.lora_B.weight"] = generator.normal(size=(outputs, rank)).astype(dtype)
    return tensors


def write_lora(
    folder: Path,
    config: Mapping[str, Any] | None = None,
    tensors: Mapping[str, np.ndarray[Any, Any]] | None = None,
    seed: int = 0,
) -> Path:
    """A LoRA folder that fits `write_base`, unless the arguments say otherwise."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(lora_config() if config is None else config))
    save_file(dict(lora_tensors(seed=seed) if tensors is None else tensors), folder / "adapter_model.safetensors")
    return folder
