"""Trains LoReFT and DiReFT (Wu et al. 2024, arXiv 2404.03592) on a transformers decoder, and saves the served format.

`preft.training.loop` owns the training loop.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file

from preft.adapters.formats.digest import PREFILL_ONLY, REFT_CONFIG_FILE, REFT_WEIGHTS_FILE
from preft.adapters.formats.reft_config import read_positions, read_reft_config
from preft.adapters.formats.reft_format import BIAS, ROTATE, SOURCE

Method = Literal["loreft", "direft"]


class Intervention(torch.nn.Module):  # type: ignore[misc]
    """One layer's ReFT: h + Rᵀ(Wh + b - Rh) for LoReFT, h + Rᵀ(Wh + b) for DiReFT.

    R [rank, hidden size] has orthonormal rows. The initial change is zero: W = R for LoReFT, W = 0 for DiReFT, b = 0.
    """

    def __init__(self, hidden: int, rank: int, method: Method) -> None:
        super().__init__()
        self.rotate = torch.nn.Linear(hidden, rank, bias=False)
        torch.nn.init.orthogonal_(self.rotate.weight)
        self.source = torch.nn.Linear(hidden, rank)
        torch.nn.init.zeros_(self.source.bias)
        if method == "loreft":
            self.source.weight.data.copy_(self.rotate.weight)
        else:
            torch.nn.init.zeros_(self.source.weight)
        torch.nn.utils.parametrizations.orthogonal(self.rotate)
        self.method = method

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """The change to `hidden` [..., hidden size]."""
        rotate = self.rotate.weight
        stream = hidden.to(rotate.dtype)
        low = self.source(stream)
        if self.method == "loreft":
            low = low - stream @ rotate.T
        return (low @ rotate).to(hidden.dtype)


class ReftModel(torch.nn.Module):  # type: ignore[misc]
    """A transformers causal language model (or a peft model of one) with a ReFT on its residual stream.

    Call it like the model itself. Only the ReFT's parameters and a peft model's trainable parameters get gradients.
    `attention_mask` defines the positions, so rows may be padded on the right.
    """

    def __init__(
        self, adapted: Any, method: Method, rank: int, layers: Sequence[int] | None = None, positions: str = "all"
    ) -> None:
        """`layers` are numbers of decoder layers, by default all; `positions` is as in reft_config.json."""
        super().__init__()
        self.first, self.last = read_positions(positions)
        if not hasattr(adapted, "disable_adapter"):
            adapted.requires_grad_(False)
        self.adapted = adapted
        blocks = _decoder_layers(adapted)
        acting = list(range(len(blocks)) if layers is None else layers)
        self.reft_config = {
            "peft_type": "REFT",
            "method": method,
            "r": rank,
            "layers": acting,
            "positions": positions,
            PREFILL_ONLY: True,
        }
        hidden = adapted.get_input_embeddings().weight
        self.interventions = torch.nn.ModuleDict(
            {str(layer): Intervention(hidden.shape[1], rank, method) for layer in acting}
        ).to(hidden.device)
        self._mask: torch.Tensor | None = None
        for layer, intervention in self.interventions.items():
            blocks[int(layer)].register_forward_hook(self._hook(intervention))

    def forward(self, *, attention_mask: torch.Tensor, **inputs: Any) -> Any:
        """`attention_mask` [rows, tokens] marks each row's prompt."""
        places = attention_mask.cumsum(dim=1)
        acts = (places <= self.first) | (places > places[:, -1:] - self.last)
        self._mask = (acts & attention_mask.bool()).unsqueeze(-1)
        try:
            return self.adapted(attention_mask=attention_mask, **inputs)
        finally:
            self._mask = None

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Switches the ReFT off inside this context; a peft model inside stays on."""
        hooks, self._hooks_on = self._hooks_on, False
        try:
            yield
        finally:
            self._hooks_on = hooks

    _hooks_on = True

    def save_pretrained(self, folder: Path | str, base_model: str | None = None) -> None:
        """Writes the ReFT to `folder`, which may hold a LoRA already."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, torch.Tensor] = {}
        for layer, one in self.interventions.items():
            parts = {ROTATE: one.rotate.weight, SOURCE: one.source.weight, BIAS: one.source.bias}
            tensors |= {
                f"layers.{layer}.{name}": part.detach().float().contiguous().cpu() for name, part in parts.items()
            }
        save_file(tensors, folder / REFT_WEIGHTS_FILE, metadata={"format": "pt"})
        named = {"base_model_name_or_path": base_model} if base_model else {}
        (folder / REFT_CONFIG_FILE).write_text(json.dumps({**self.reft_config, **named}, indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, adapted: Any, folder: Path | str) -> ReftModel:
        """The ReFT in `folder` over `adapted`, for evaluation or further training. Raises InvalidAdapter."""
        folder = Path(folder)
        config = read_reft_config(folder)
        positions = json.loads((folder / REFT_CONFIG_FILE).read_bytes())["positions"]
        model = cls(adapted, config.method, config.rank, config.layers, positions)  # type: ignore[arg-type]
        tensors = load_file(folder / REFT_WEIGHTS_FILE)
        for layer, one in model.interventions.items():
            one.rotate.weight = tensors[f"layers.{layer}.{ROTATE}"]
            one.source.weight.data.copy_(tensors[f"layers.{layer}.{SOURCE}"])
            one.source.bias.data.copy_(tensors[f"layers.{layer}.{BIAS}"])
        return model

    def _hook(self, intervention: torch.nn.Module) -> Any:
        def hook(module: Any, arguments: Any, output: Any) -> Any:
            if self._mask is None or not self._hooks_on:
                return output
            stream = output[0] if isinstance(output, tuple) else output
            changed = stream + intervention(stream) * self._mask
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        return hook


def _decoder_layers(model: Any) -> Any:
    """The decoder layers of a causal language model, or of the one inside a peft model."""
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    return model.get_decoder().layers
