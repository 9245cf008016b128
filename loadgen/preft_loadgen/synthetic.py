"""Synthetic adapters for any base model: random weights, equal for equal seeds. Only the amount of work is realistic.

Knows a base model by its folder: config.json, and the shapes in the headers of its safetensors files. Without weights,
the shapes follow from the config, as in Llama.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np

from preft_loadgen.errors import InvalidArgument

LINEAR = re.compile(r"(.*\blayers\.(\d+)\.(?:[\w.]*\.)?([a-z_]+_proj))\.weight")
SCALE = 0.25  # of both matrices of a LoRA: changes a model's answers, but no number overflows


class Kind(StrEnum):
    """LORA: PEFT's, on all linear layers. LOREFT and DIREFT: after all decoder layers."""

    LORA = "lora"
    LOREFT = "loreft"
    DIREFT = "direft"


@dataclass(frozen=True, slots=True)
class BaseShape:
    """What an adapter must fit: hidden size, decoder layers, each linear layer's outputs and inputs by its path."""

    hidden: int
    layers: int
    linears: dict[str, tuple[int, int]]


def read_shape(model: Path) -> BaseShape:
    """The shape of the base model in this folder. Raises InvalidArgument."""
    try:
        config = json.loads((model / "config.json").read_text())
    except OSError as error:
        raise InvalidArgument(f"{model / 'config.json'} can't be read: {error.strerror}") from error
    except ValueError as error:
        raise InvalidArgument(f"{model / 'config.json'} isn't JSON: {error}") from error
    text = config.get("text_config", config) if isinstance(config, dict) else {}
    try:
        hidden, layers = int(text["hidden_size"]), int(text["num_hidden_layers"])
        linears = _linears_of_weights(model) or _linears_of_config(text, hidden, layers)
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidArgument(
            f"{model} isn't a model that LoRAs are known for: its config.json lacks {error}"
        ) from error
    return BaseShape(hidden, layers, linears)


def make_adapters(
    shape: BaseShape, folder: Path, *, count: int, kind: Kind, rank: int, seed: int, step: Callable[[], object]
) -> list[Path]:
    """Writes `count` adapter folders `<kind>-0000`, ... into `folder`; calls `step` after each. Returns the folders.

    The k-th adapter depends on seed, kind, rank and k alone. Raises InvalidArgument.
    """
    if not 1 <= count <= 100_000:
        raise InvalidArgument(f"the number of adapters is from 1 to 100000, not {count}")
    if not 1 <= rank <= shape.hidden:
        raise InvalidArgument(f"the rank is from 1 to the hidden size of {shape.hidden}, not {rank}")
    made = []
    for number in range(count):
        path = folder / f"{kind}-{number:04}"
        try:
            write_adapter(shape, path, kind=kind, rank=rank, seed=(seed, number))
        except OSError as error:
            raise InvalidArgument(f"{path} can't be written: {error.strerror}") from error
        made.append(path)
        step()
    return made


def write_adapter(shape: BaseShape, folder: Path, *, kind: Kind, rank: int, seed: tuple[int, ...]) -> None:
    """Writes one adapter folder, trained for the prompt pass alone as its config says. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    source = np.random.default_rng(seed)
    if kind is Kind.LORA:
        _write_lora(shape, folder, rank, source)
    else:
        _write_reft(shape, folder, kind, rank, source)


def _write_lora(shape: BaseShape, folder: Path, rank: int, source: np.random.Generator) -> None:
    """A PEFT folder, float16."""
    tensors = {}
    for path, (outputs, inputs) in shape.linears.items():
        for part, size in (("lora_A", (rank, inputs)), ("lora_B", (outputs, rank))):
            tensor = source.standard_normal(size, np.float32) * np.float32(SCALE / size[-1] ** 0.5)
            tensors[f"base_model.model.{path}.{part}.weight"] = tensor.astype(np.float16)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted({path.rpartition(".")[2] for path in shape.linears}),
        "bias": "none",
        "prefill_only": True,
    }
    _write(folder, "adapter_model.safetensors", tensors, "adapter_config.json", config)


def _write_reft(shape: BaseShape, folder: Path, kind: Kind, rank: int, source: np.random.Generator) -> None:
    """A ReFT folder after all layers, float32. The rows of R are orthonormal, as in training."""
    tensors: dict[str, Any] = {}
    for layer in range(shape.layers):
        rotate, _ = np.linalg.qr(source.standard_normal((shape.hidden, rank)))
        learned = source.standard_normal((rank, shape.hidden)) / shape.hidden**0.5
        parts = {
            "rotate_layer.weight": rotate.T,
            "learned_source.weight": learned,
            "learned_source.bias": np.zeros(rank),
        }
        tensors |= {f"layers.{layer}.{name}": np.ascontiguousarray(part, np.float32) for name, part in parts.items()}
    config = {
        "peft_type": "REFT",
        "method": str(kind),
        "r": rank,
        "layers": [*range(shape.layers)],
        "positions": "all",
        "prefill_only": True,
    }
    _write(folder, "reft_model.safetensors", tensors, "reft_config.json", config)


def _write(folder: Path, weights: str, tensors: dict[str, Any], config_file: str, config: dict[str, Any]) -> None:
    from safetensors.numpy import save_file

    save_file(tensors, folder / weights, metadata={"format": "pt"})
    (folder / config_file).write_text(json.dumps(config, indent=2))


def _linears_of_weights(model: Path) -> dict[str, tuple[int, int]]:
    """The linear layers of the decoder, by the names of their weights; empty without weights."""
    from safetensors import SafetensorError, safe_open

    found = {}
    for file in sorted(model.glob("*.safetensors")):
        try:
            with safe_open(file, framework="numpy") as weights:
                for name in weights.keys():  # noqa: SIM118 - it isn't a dict
                    path = LINEAR.fullmatch(name)
                    if path and "expert" not in name and "vision" not in name:
                        outputs, inputs = weights.get_slice(name).get_shape()
                        found[path[1]] = (int(outputs), int(inputs))
        except (OSError, ValueError, SafetensorError) as error:
            raise InvalidArgument(f"{file} can't be read as safetensors: {error}") from error
    return found


def _linears_of_config(config: dict[str, Any], hidden: int, layers: int) -> dict[str, tuple[int, int]]:
    heads = int(config["num_attention_heads"])
    head = int(config.get("head_dim") or hidden // heads)
    keys, inner = head * int(config.get("num_key_value_heads") or heads), int(config["intermediate_size"])
    linears = {
        "self_attn.q_proj": (head * heads, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, head * heads),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    return {f"model.layers.{layer}.{name}": size for layer in range(layers) for name, size in linears.items()}
