"""Checks a PEFT LoRA folder against the base model, tensor by tensor, without torch.

A folder that passes loads in the engine. The adapter changes exactly the modules that its tensors name, and its
configuration selects the same modules. `peft_config` reads the configuration.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from preft.adapters.formats.adapter_tensors import check_finite, read_tensors
from preft.adapters.formats.base_copies import check_copies
from preft.adapters.formats.base_model import MODULE, TARGETS, BaseModel
from preft.adapters.formats.digest import CONFIG_FILE, WEIGHTS_FILE
from preft.adapters.formats.patterns import match_apart
from preft.adapters.formats.peft_config import LoraConfig, read_lora_config
from preft.adapters.formats.tensor_file import TensorEntry
from preft.adapters.formats.tensor_names import HEAD, LoraTensor, read_base_name, read_lora_name
from preft.core.errors import InvalidAdapter

ANY_LORA = re.compile(r"(?:base_model\.model\.)*(?P<module>.+)\.lora_[AB](?:\.[\w-]+)?\.weight")
EMBEDDING_LORA = re.compile(r".*\.lora_embedding_[AB](?:\.[\w-]+)?")
SERVED_MODULES = f"{', '.join(TARGETS)} of the decoder layers and {HEAD}"


@dataclass(frozen=True, slots=True)
class LoraSummary:
    """A LoRA's highest rank, and warnings for the user."""

    rank: int
    warnings: tuple[str, ...]


def check_lora(folder: Path, base: BaseModel, max_rank: int) -> LoraSummary:
    """Reads the whole LoRA and checks it against `base`. Blocks.

    Raises InvalidAdapter for the first fault, with one sentence that names the file and the field or tensor.
    """
    config = read_lora_config(folder, max_rank)
    path = folder / WEIGHTS_FILE
    entries = read_tensors(path)
    copies = {name: kind for name in entries if (kind := read_base_name(name))}
    lora = {name: _read(name, base) for name in entries if name not in copies}
    pairs = _pairs(lora)
    if not pairs:
        raise InvalidAdapter(f"{WEIGHTS_FILE} holds no LoRA tensors")
    shapes = {
        module: _check_pair(module, {side: entries[name] for side, name in names.items()}, base, max_rank)
        for module, names in sorted(pairs.items())
    }
    _check_config(config, lora, shapes, base)
    warnings = check_copies(path, entries, copies, base)
    check_finite(path, {name: entries[name] for name in lora})
    return LoraSummary(max(shapes.values()), (*config.warnings, *warnings))


def _read(name: str, base: BaseModel) -> LoraTensor:
    """Reads the tensor's name. Raises InvalidAdapter if the base model has no such module."""
    tensor = read_lora_name(name)
    if tensor is not None and tensor.module in base.modules:
        return tensor
    other = ANY_LORA.fullmatch(name)
    if EMBEDDING_LORA.fullmatch(name):
        raise _wrong(name, f"adapts the embedding, but only {SERVED_MODULES} can be adapted")
    if other is None:
        raise _wrong(name, "is not a lora_A or lora_B weight")
    module = tensor.module if tensor is not None else other["module"]
    layer = MODULE.fullmatch(module)
    if layer is None:
        raise _wrong(name, f"adapts {module}, but only {SERVED_MODULES} can be adapted")
    if int(layer[1]) >= base.layers:
        raise _wrong(name, f"adapts layer {layer[1]}, but the base model's layers are 0 to {base.layers - 1}")
    raise _wrong(name, f"adapts {module}, which the base model doesn't have")


def _pairs(lora: Mapping[str, LoraTensor]) -> dict[str, dict[str, str]]:
    """Each module's two tensor names, by side. Raises InvalidAdapter for two adapters, or a side that occurs twice."""
    pairs: dict[str, dict[str, str]] = {}
    adapters = sorted({tensor.adapter for tensor in lora.values()})
    if len(adapters) > 1:
        shown = " and ".join(repr(adapter) for adapter in adapters[:2])
        raise InvalidAdapter(f"{WEIGHTS_FILE}: its tensors are of more than one adapter ({shown}): save one alone")
    for name, tensor in lora.items():
        sides = pairs.setdefault(tensor.module, {})
        if tensor.side in sides:
            raise _wrong(name, f"is there twice: {sides[tensor.side]} is lora_{tensor.side} of {tensor.module} too")
        sides[tensor.side] = name
    return pairs


def _check_pair(module: str, sides: Mapping[str, TensorEntry], base: BaseModel, max_rank: int) -> int:
    """Returns the pair's rank. Raises InvalidAdapter unless A [rank, inputs] and B [outputs, rank] fit the base."""
    for side in "AB":
        if side not in sides:
            raise InvalidAdapter(
                f"{WEIGHTS_FILE}: {module} has a lora_{'B' if side == 'A' else 'A'} but no lora_{side}"
            )
        if len(sides[side].shape) != 2:
            raise _wrong(f"{module}.lora_{side}", f"has {len(sides[side].shape)} dimensions, not 2")
    (rank, inputs), (outputs, rank_b) = sides["A"].shape, sides["B"].shape
    if not 1 <= rank <= max_rank:
        raise _wrong(f"{module}.lora_A", f"has rank {rank}, served are ranks 1 to {max_rank} (prefill.max_lora_rank)")
    if rank != rank_b:
        raise InvalidAdapter(f"{WEIGHTS_FILE}: {module} has rank {rank} in lora_A but {rank_b} in lora_B")
    if (outputs, inputs) != base.modules[module]:
        raise InvalidAdapter(
            f"{WEIGHTS_FILE}: {module} is adapted as {inputs} inputs and {outputs} outputs, "
            f"but the base model has {base.modules[module][1]} and {base.modules[module][0]}"
        )
    return rank


def _check_config(
    config: LoraConfig, lora: Mapping[str, LoraTensor], ranks: Mapping[str, int], base: BaseModel
) -> None:
    """Raises InvalidAdapter if PEFT, with this config, would ignore or miss a tensor, or expect another rank."""
    spellings = _spellings(lora, base)
    expected = config.targets.chosen(spellings, match_apart)
    for module in sorted(ranks.keys() - expected):
        raise InvalidAdapter(
            f"{WEIGHTS_FILE} holds a LoRA of {module}, which {CONFIG_FILE} leaves out: PEFT would not apply it. "
            "Look at target_modules, exclude_modules and layers_to_transform"
        )
    for module in sorted(expected - ranks.keys()):
        raise InvalidAdapter(
            f"{CONFIG_FILE} adapts {module}, of which {WEIGHTS_FILE} holds no LoRA: look at target_modules, "
            "exclude_modules and layers_to_transform"
        )
    if HEAD in ranks and config.targets.ties:
        raise InvalidAdapter(
            f"{CONFIG_FILE}: ensure_weight_tying is set, and a LoRA of the embedding beside {HEAD} is not supported"
        )
    own = {module: spellings[module] for module in ranks}
    asked = config.ranks(own, match_apart)
    for module, rank in ranks.items():
        if rank != asked[module]:
            raise _wrong(f"{module}.lora_A", f"has rank {rank}, but {CONFIG_FILE} says {asked[module]}")
    config.scalings(ranks, own, match_apart)  # the engine matches these patterns later, without a time limit


def _spellings(lora: Mapping[str, LoraTensor], base: BaseModel) -> dict[str, tuple[str, ...]]:
    """All names of each of the base model's modules: its own, and its names in the model of the training."""
    prefixes: dict[bool, set[str]] = {True: set(), False: set()}
    for tensor in lora.values():
        prefixes[tensor.module == HEAD].add(tensor.spelling.removesuffix(tensor.module.removeprefix("model.")))
    return {
        module: (module, *(prefix + module.removeprefix("model.") for prefix in sorted(prefixes[module == HEAD])))
        for module in base.modules
    }


def _wrong(tensor: str, problem: str) -> InvalidAdapter:
    return InvalidAdapter(f"{WEIGHTS_FILE}: tensor {tensor} {problem}")
