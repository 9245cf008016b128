"""Checks a PEFT LoRA folder against the base model, tensor by tensor, without torch.

Whatever passes here loads in the engine and changes exactly the modules its tensors name.
"""

from __future__ import annotations

import re
from pathlib import Path

from preft.adapters.adapter_tensors import check_finite, read_tensors
from preft.adapters.base_model import MODULE, TARGETS, BaseModel
from preft.adapters.digest import CONFIG_FILE, WEIGHTS_FILE
from preft.adapters.peft_config import LoraConfig, check_patterns, read_config
from preft.adapters.tensor_file import TensorEntry
from preft.core.errors import InvalidAdapter

TENSOR = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<side>[AB])\.weight")


def check_lora(folder: Path, base: BaseModel, max_rank: int) -> int:
    """Reads the whole LoRA, holds it against `base`, and returns its highest rank. Blocks while it reads.

    Raises InvalidAdapter, one sentence with the file and the field or tensor, for the first thing that is wrong.
    """
    config = read_config(folder, max_rank)
    path = folder / WEIGHTS_FILE
    entries = read_tensors(path)
    pairs: dict[str, dict[str, TensorEntry]] = {}
    for name, entry in entries.items():
        module, side = _parse(name, base)
        if side in pairs.setdefault(module, {}):
            raise _wrong(name, "is there twice, with and without the prefix base_model.model")
        pairs[module][side] = entry
    check_patterns(config, pairs)
    ranks = [_check_pair(module, sides, config, base, max_rank) for module, sides in sorted(pairs.items())]
    check_finite(path, entries)
    return max(ranks)


def _parse(name: str, base: BaseModel) -> tuple[str, str]:
    """The adapted module's full name in the base model, and "A" or "B"."""
    match = TENSOR.fullmatch(name)
    if match is None:
        raise _wrong(name, "is not a lora_A or lora_B weight")
    module, side = match["module"], match["side"]
    if module in base.modules:
        return module, side
    layer = MODULE.fullmatch(module)
    if layer is None:
        raise _wrong(name, f"adapts {module}, but only {', '.join(TARGETS)} of the decoder layers can be adapted")
    if int(layer[1]) >= base.layers:
        raise _wrong(name, f"adapts layer {layer[1]}, but the base model's layers are 0 to {base.layers - 1}")
    raise _wrong(name, f"adapts {module}, which the base model doesn't have")


def _check_pair(module: str, sides: dict[str, TensorEntry], config: LoraConfig, base: BaseModel, max_rank: int) -> int:
    """The pair's rank, once A [rank, inputs] and B [outputs, rank] fit the config and the base weight."""
    for side in "AB":
        if side not in sides:
            raise InvalidAdapter(
                f"{WEIGHTS_FILE}: {module} has a lora_{'B' if side == 'A' else 'A'} but no lora_{side}"
            )
        if len(sides[side].shape) != 2:
            raise _wrong(f"{module}.lora_{side}", f"has {len(sides[side].shape)} dimensions, not 2")
    (rank, inputs), (outputs, rank_b) = sides["A"].shape, sides["B"].shape
    if not 1 <= rank <= max_rank:
        raise _wrong(f"{module}.lora_A", f"has rank {rank}, served are ranks 1 to {max_rank}")
    if rank != rank_b:
        raise InvalidAdapter(f"{WEIGHTS_FILE}: {module} has rank {rank} in lora_A but {rank_b} in lora_B")
    if rank != config.rank_of(module):
        raise _wrong(f"{module}.lora_A", f"has rank {rank}, but {CONFIG_FILE} says {config.rank_of(module)}")
    if (outputs, inputs) != base.modules[module]:
        raise InvalidAdapter(
            f"{WEIGHTS_FILE}: {module} is adapted as {inputs} inputs and {outputs} outputs, "
            f"but the base model has {base.modules[module][1]} and {base.modules[module][0]}"
        )
    return rank


def _wrong(tensor: str, problem: str) -> InvalidAdapter:
    return InvalidAdapter(f"{WEIGHTS_FILE}: tensor {tensor} {problem}")
