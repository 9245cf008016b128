"""An adapter's weights for its engine: views of the files that the worker has put into shared memory.

The module maps names in files to modules of the model. The caller owns the memory and chooses the slot. Weights aren't
copied here, except where ReFT's own form has to be computed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.lora.utils import parse_fine_tuned_lora_name

from preft.adapters.formats.digest import CONFIG_FILE, REFT_CONFIG_FILE, REFT_WEIGHTS_FILE, WEIGHTS_FILE
from preft.adapters.formats.patterns import match_here
from preft.adapters.formats.peft_config import LoraConfig, parse_lora_config
from preft.adapters.formats.reft_config import ReftConfig, parse_reft_config
from preft.adapters.formats.reft_format import BIAS, ROTATE, SOURCE
from preft.adapters.formats.tensor_file import entries_in
from preft.adapters.formats.tensor_names import HEAD, read_base_name, read_lora_name
from preft.adapters.store.packed import unpack

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(slots=True)
class LoraPart:
    """LoRA of one linear layer, or of one slice of a packed layer: A [rank, inputs], B [outputs, rank]."""

    a: torch.Tensor
    b: torch.Tensor
    scaling: float


@dataclass(slots=True)
class ReftPart:
    """ReFT of one decoder layer: h + B(A h + c), with A [rank, hidden], B [hidden, rank], c [rank]."""

    a: torch.Tensor
    b: torch.Tensor
    c: torch.Tensor


@dataclass(slots=True)
class AdapterWeights:
    """An adapter's parts, as views of the memory that they were read from. `id` is vLLM's.

    `lora` maps a module's name to its slices by number, `reft` a decoder layer's number to its part.
    """

    id: int
    lora: dict[str, dict[int, LoraPart]] = field(default_factory=dict)
    reft: dict[int, ReftPart] = field(default_factory=dict)
    reft_config: ReftConfig | None = None

    @property
    def lora_rank(self) -> int:
        """The highest rank of a LoRA part; 0 if there is none."""
        return max((part.a.shape[0] for parts in self.lora.values() for part in parts.values()), default=0)

    @property
    def head_rank(self) -> int:
        """The rank of the output layer's LoRA; 0 if there is none."""
        return self.lora[HEAD][0].a.shape[0] if HEAD in self.lora else 0

    def drop(self) -> None:
        self.lora, self.reft = {}, {}


def read_weights(
    adapter_id: int,
    memory: memoryview,
    place_of: Callable[[str], tuple[str, int] | None],
    mapper: Any,
    max_rank: int,
) -> AdapterWeights:
    """Reads the packed adapter in `memory`. `place_of` maps a linear layer's name to its module and slice.

    `mapper` is the model's vLLM WeightsMapper, or None. Raises ValueError or InvalidAdapter for unsupported weights.
    """
    files = unpack(memory)
    weights = AdapterWeights(adapter_id)
    if CONFIG_FILE in files:
        config = parse_lora_config(bytes(files[CONFIG_FILE]), max_rank)
        weights.lora = _lora_parts(tensors_in(files[WEIGHTS_FILE]), config, place_of, mapper)
    if REFT_CONFIG_FILE in files:
        weights.reft_config = parse_reft_config(bytes(files[REFT_CONFIG_FILE]))
        weights.reft = _reft_parts(tensors_in(files[REFT_WEIGHTS_FILE]), weights.reft_config)
    return weights


def tensors_in(memory: memoryview) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file in memory, as views."""
    tensors = {}
    for name, entry in entries_in(memory).items():
        dtype = DTYPES[entry.dtype]
        count = (entry.end - entry.start) // dtype.itemsize
        flat = torch.frombuffer(memory, dtype=dtype, count=count, offset=entry.start) if count else torch.empty(0)
        tensors[name] = flat.view(entry.shape)
    return tensors


def _lora_parts(
    tensors: Mapping[str, torch.Tensor],
    config: LoraConfig,
    place_of: Callable[[str], tuple[str, int] | None],
    mapper: Any,
) -> dict[str, dict[int, LoraPart]]:
    sides: dict[str, dict[str, torch.Tensor]] = {}
    spellings: dict[str, tuple[str, str]] = {}
    for name, weight in tensors.items():
        tensor = read_lora_name(name)
        if tensor is not None:
            sides.setdefault(tensor.module, {})[tensor.side] = weight
            spellings[tensor.module] = (tensor.module, tensor.spelling)
        elif read_base_name(name) is None:
            raise ValueError(f"{name} is no LoRA tensor")
    if unpaired := sorted(module for module, pair in sides.items() if len(pair) < 2):
        raise ValueError(f"{unpaired[0]} has one side of a LoRA alone")
    scalings = config.scalings({module: len(pair["A"]) for module, pair in sides.items()}, spellings, match_here)
    parts: dict[str, dict[int, LoraPart]] = {}
    for module, pair in sides.items():
        place = place_of(parse_fine_tuned_lora_name(f"base_model.model.{module}.lora_A.weight", mapper)[0])
        if place is None:
            raise ValueError(f"the served model takes no LoRA on {module}")
        parts.setdefault(place[0], {})[place[1]] = LoraPart(pair["A"], pair["B"], scalings[module])
    return parts


def _reft_parts(tensors: Mapping[str, torch.Tensor], config: ReftConfig) -> dict[int, ReftPart]:
    parts = {}
    for layer in config.layers:
        rotate, source, bias = (tensors[f"layers.{layer}.{part}"].float() for part in (ROTATE, SOURCE, BIAS))
        parts[layer] = ReftPart(source - rotate if config.method == "loreft" else source, rotate.T, bias)
    return parts
