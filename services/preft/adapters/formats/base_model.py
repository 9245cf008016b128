"""The base model's linear layers and their shapes, which adapters must fit. The model is not loaded.

The module covers models whose decoder layers have Llama's names (Llama, Mistral, Qwen2, Qwen3, Gemma and similar).
Weights packed by a quantiser don't show their shape, so adapters on their modules are refused. The output layer can
have a LoRA on the architectures of `DECODERS`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from preft.adapters.formats.folder_texts import read_texts
from preft.adapters.formats.tensor_file import BrokenTensorFile, TensorEntry, read_entries
from preft.adapters.formats.tensor_names import EMBEDDING, HEAD
from preft.core.errors import ConfigError

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MODULE = re.compile(rf"model\.layers\.(\d+)\.(?:self_attn|mlp)\.(?:{'|'.join(TARGETS)})")
DECODERS = (  # their decoder layers return (hidden, residual), whose sum is the residual stream
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
)
SHOWN_DTYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")


@dataclass(frozen=True, slots=True)
class BaseModel:
    """`modules` maps a linear layer's full name to its weight's shape (output features, input features).

    `hidden` is the width of the residual stream, `architecture` the name of the model class. `embeddings` holds file
    and place of the embedding's and the output layer's weight; a model that ties them has one weight for both. `texts`
    holds the beginnings of the model's text files, for `text_warnings`.
    """

    layers: int
    modules: Mapping[str, tuple[int, ...]]
    hidden: int
    architecture: str
    embeddings: Mapping[str, tuple[Path, TensorEntry]] = field(default_factory=dict)
    texts: Mapping[str, bytes] = field(default_factory=dict)


def read_base_model(folder: Path) -> BaseModel:
    """Reads config.json and the headers of the safetensors files in `folder`; blocks for some milliseconds per file.

    Raises ConfigError if a file is missing or broken.
    """
    config = _json(folder / "config.json")
    layers = config.get("num_hidden_layers")
    if type(layers) is not int:
        raise ConfigError(f"model: {folder / 'config.json'} has no num_hidden_layers")
    weights = {
        name.removesuffix(".weight"): (path, entry)
        for path in _weight_files(folder)
        for name, entry in _entries(path).items()
    }
    modules = {name: found[1].shape for name, found in weights.items() if MODULE.fullmatch(name) and _shown(found[1])}
    hidden, architectures = config.get("hidden_size"), config.get("architectures")
    if type(hidden) is not int:
        raise ConfigError(f"model: {folder / 'config.json'} has no hidden_size")
    architecture = str(architectures[0]) if isinstance(architectures, list) and architectures else "this architecture"
    embeddings = {name: weights[name] for name in (EMBEDDING, HEAD) if name in weights and _shown(weights[name][1])}
    if EMBEDDING in embeddings:
        embeddings.setdefault(HEAD, embeddings[EMBEDDING])
    if HEAD in embeddings and architecture in DECODERS:
        modules[HEAD] = embeddings[HEAD][1].shape
    return BaseModel(layers, modules, hidden, architecture, embeddings, read_texts(folder))


def _shown(entry: TensorEntry) -> bool:
    return entry.dtype in SHOWN_DTYPES and len(entry.shape) == 2


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = _json(index).get("weight_map")
        if not isinstance(names, dict):
            raise ConfigError(f"model: {index} has no weight_map")
        return [folder / str(name) for name in sorted(set(names.values()))]
    if not (folder / "model.safetensors").exists():
        raise ConfigError(f"model: {folder} holds no model.safetensors")
    return [folder / "model.safetensors"]


def _entries(path: Path) -> dict[str, TensorEntry]:
    try:
        return read_entries(path)
    except (OSError, BrokenTensorFile) as error:
        raise ConfigError(f"model: {path} can't be used: {error}") from error


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"model: {path} can't be read: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"model: {path} is not a JSON object")
    return value
