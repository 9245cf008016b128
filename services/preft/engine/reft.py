"""ReFT inside vLLM: decoder layers that add ReFT deltas to the residual stream.

For vLLM a wrapped decoder layer is one more LoRA module. Extension point used: `BaseLayerWithLoRA`.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from vllm.config.lora import LoRAConfig
from vllm.lora.layers.base import BaseLayerWithLoRA
from vllm.lora.utils import replace_submodule

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
    """A decoder layer after which each token's own ReFT changes the residual stream."""

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
        raise NotImplementedError("a decoder layer takes ReFT, by set_reft")

    def set_reft(self, slot: int, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> None:
        """Sets A [rank, hidden], B [hidden, rank] and c [rank], with zeros beyond that rank."""
        self.reset_lora(slot)
        rank = a.shape[0]
        self.a[slot, :rank].copy_(a)
        self.b[slot, :, :rank].copy_(b)
        self.c[slot, :rank].copy_(c)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        hidden, residual = self.base_layer(*args, **kwargs)
        residual_delta_(hidden, residual, self.a, self.b, self.c, self.punica_wrapper.reft)
        return hidden, residual


def wrap_decoder_layers(model: torch.nn.Module, slots: int, config: LoRAConfig) -> dict[int, ReftLayer]:
    """Wraps each decoder layer of `model` with a known class in a ReftLayer, and returns the wrappers by number."""
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
