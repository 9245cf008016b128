"""ReFT inside vLLM: decoder layers that take ReFT deltas, and the weights of a ReFT folder in the form they take.

To vLLM's machinery a wrapped decoder layer is one more LoRA module: A is [rank, hidden + 1], whose last column is the
bias, and B is [hidden, rank]. Extension points used: `BaseLayerWithLoRA`, `LoRAModel.loras`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from vllm.config.lora import LoRAConfig
from vllm.lora.layers.base import BaseLayerWithLoRA
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import LoRALayerWeights
from vllm.lora.utils import replace_submodule

from preft.adapters.digest import REFT_WEIGHTS_FILE
from preft.adapters.reft_config import ReftConfig
from preft.adapters.reft_format import BIAS, ROTATE, SOURCE
from preft_kernels.residual_delta import residual_delta_

DECODER_LAYERS = {  # classes whose forward returns (hidden, residual), whose sum is the residual stream
    "LlamaDecoderLayer",
    "MistralDecoderLayer",
    "Qwen2DecoderLayer",
    "Qwen3DecoderLayer",
    "Gemma2DecoderLayer",
    "Gemma3DecoderLayer",
}
LAYER = re.compile(r"(?:.*\.)?layers\.(\d+)")


class ReftLayer(BaseLayerWithLoRA):
    """A decoder layer, after which each token's own ReFT acts on the residual stream."""

    def __init__(self, name: str, base_layer: torch.nn.Module, slots: int, config: LoRAConfig) -> None:
        """`name` is the layer's path in the model."""
        super().__init__()
        self.name = name
        self.base_layer = base_layer
        norm = base_layer.input_layernorm.weight
        hidden, rank = norm.shape[0], config.max_lora_rank
        self.a = torch.zeros(slots, rank, hidden, dtype=config.lora_dtype, device=norm.device)
        self.b = torch.zeros(slots, hidden, rank, dtype=config.lora_dtype, device=norm.device)
        self.c = torch.zeros(slots, rank, dtype=config.lora_dtype, device=norm.device)

    def reset_lora(self, index: int) -> None:
        for stack in (self.a, self.b, self.c):
            stack[index] = 0

    def set_lora(self, index: int, lora_a: Any, lora_b: Any) -> None:
        self.reset_lora(index)
        rank = lora_a.shape[0]
        self.a[index, :rank].copy_(lora_a[:, :-1])
        self.c[index, :rank].copy_(lora_a[:, -1])
        self.b[index, :, :rank].copy_(lora_b)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        hidden, residual = self.base_layer(*args, **kwargs)
        residual_delta_(hidden, residual, self.a, self.b, self.c, self.punica_wrapper.reft)
        return hidden, residual


def wrap_decoder_layers(model: torch.nn.Module, slots: int, config: LoRAConfig) -> dict[int, ReftLayer]:
    """Puts a ReftLayer around each decoder layer of `model` whose kind is known, and returns them by number."""
    found = [
        (int(match[1]), name, module)
        for name, module in model.named_modules()
        if (match := LAYER.fullmatch(name)) and type(module).__name__ in DECODER_LAYERS
    ]
    layers = {}
    for number, name, module in found:
        layers[number] = ReftLayer(name, module, slots, config)
        replace_submodule(model, name, layers[number])
    return layers


def add_reft_weights(
    model: LoRAModel, folder: Path, reft: ReftConfig, layers: Mapping[int, ReftLayer], config: LoRAConfig
) -> None:
    """Adds the ReFT in `folder` to the adapter `model`. Raises ValueError if the served model can't take it."""
    if not config.max_lora_rank or reft.rank > config.max_lora_rank:
        raise ValueError(f"its rank {reft.rank} is more than the largest served rank {config.max_lora_rank}")
    tensors = load_file(folder / REFT_WEIGHTS_FILE)
    for number in reft.layers:
        if number not in layers:
            raise ValueError(f"the served model has no decoder layer {number} that takes ReFT")
        rotate, source, bias = (tensors[f"layers.{number}.{part}"].float() for part in (ROTATE, SOURCE, BIAS))
        a = torch.cat([source - rotate if reft.method == "loreft" else source, bias[:, None]], dim=1)
        model.loras[layers[number].name] = LoRALayerWeights(
            layers[number].name,
            reft.rank,
            reft.rank,
            a.to(config.lora_dtype),
            rotate.T.contiguous().to(config.lora_dtype),
        )
