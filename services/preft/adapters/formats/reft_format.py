"""Checks a ReFT folder against the base model, tensor by tensor, without torch. docs/adapters.md has the format."""

from __future__ import annotations

from pathlib import Path

from preft.adapters.formats.adapter_tensors import check_finite, read_tensors
from preft.adapters.formats.base_model import DECODERS, BaseModel
from preft.adapters.formats.digest import REFT_CONFIG_FILE, REFT_WEIGHTS_FILE
from preft.adapters.formats.reft_config import ReftConfig, read_reft_config
from preft.core.errors import InvalidAdapter

ROTATE, SOURCE, BIAS = "rotate_layer.weight", "learned_source.weight", "learned_source.bias"


def check_reft(folder: Path, base: BaseModel, max_rank: int) -> int:
    """Reads the whole ReFT, checks it against `base`, and returns its rank. Blocks.

    Raises InvalidAdapter for the first fault, with one sentence that names the file and the field or tensor.
    """
    if base.architecture not in DECODERS:
        raise InvalidAdapter(f"ReFT adapters can't be served on {base.architecture}, only on {', '.join(DECODERS)}")
    config = read_reft_config(folder)
    if config.rank > max_rank:
        raise InvalidAdapter(
            f"{REFT_CONFIG_FILE}: r is {config.rank}, more than the largest served rank {max_rank}: "
            "raise prefill.max_lora_rank"
        )
    for layer in config.layers:
        if layer >= base.layers:
            raise InvalidAdapter(
                f"{REFT_CONFIG_FILE}: layers has {layer}, but the base model's layers are 0 to {base.layers - 1}"
            )
    entries = read_tensors(folder / REFT_WEIGHTS_FILE)
    expected = _shapes(config, base.hidden)
    for name, entry in entries.items():
        if name not in expected:
            raise InvalidAdapter(f"{REFT_WEIGHTS_FILE}: tensor {name} is none that {REFT_CONFIG_FILE} asks for")
        if entry.shape != expected[name]:
            raise InvalidAdapter(
                f"{REFT_WEIGHTS_FILE}: tensor {name} has shape {list(entry.shape)}, "
                f"but rank {config.rank} and hidden size {base.hidden} ask for {list(expected[name])}"
            )
    for name in expected:
        if name not in entries:
            raise InvalidAdapter(f"{REFT_WEIGHTS_FILE}: tensor {name} is missing")
    check_finite(folder / REFT_WEIGHTS_FILE, entries)
    return config.rank


def _shapes(config: ReftConfig, hidden: int) -> dict[str, tuple[int, ...]]:
    parts = {ROTATE: (config.rank, hidden), SOURCE: (config.rank, hidden), BIAS: (config.rank,)}
    return {f"layers.{layer}.{part}": shape for layer in config.layers for part, shape in parts.items()}
