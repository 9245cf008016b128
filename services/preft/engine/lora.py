"""Our adapters inside vLLM: a punica wrapper over our own kernels, and the managers that install it and load ReFT.

Extension points used: `LRUCacheWorkerLoRAManager._manager_cls` and `_load_adapter`; `LoRAModelManager`'s
`_init_punica_wrapper`, `_create_lora_modules` and `activate_adapter`; the `PunicaWrapperBase` interface. The stock CPU
wrapper takes slot -1 (no adapter) for the last slot, so that a base request in a mixed batch gets another tenant's
adapter; this one leaves such tokens alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.lora.lora_model import LoRAModel
from vllm.lora.model_manager import DEFAULT_LANGUAGE_WRAPPER_KEY, LRUCacheLoRAModelManager
from vllm.lora.punica_wrapper.punica_base import PunicaWrapperBase
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

from preft.adapters.digest import CONFIG_FILE, REFT_CONFIG_FILE, adapter_files
from preft.adapters.reft_config import EVERY, ReftConfig, read_reft_config
from preft.engine.reft import add_reft_weights, wrap_decoder_layers
from preft_kernels.low_rank_delta import BASE, low_rank_delta_


class GroupedPunicaWrapper(PunicaWrapperBase):
    """Applies adapters to the tokens that name them, grouped by slot; every other token is untouched.

    `_slots` and `reft_slots` are persistent buffers over the largest batch, refilled on the host each step with the
    tail set to BASE, so that compiled graphs may hold on to them. They differ where an adapter has no LoRA, or has no
    ReFT that acts on the token's position.
    """

    def __init__(
        self, max_num_batched_tokens: int, max_batches: int, device: torch.device | str, **kwargs: Any
    ) -> None:
        super().__init__(max_num_batched_tokens, max_batches, device)
        self._slots = torch.full((max_num_batched_tokens,), BASE, dtype=torch.int32, device=device)
        self.reft_slots = self._slots.clone()
        self._named = self._slots.cpu().numpy().copy()
        self._sampler_slots = torch.full((max_num_batched_tokens,), BASE, dtype=torch.int32, device=device)

    def update_metadata(
        self, mapping: Any, lora_index_to_id: list[int | None], max_loras: int, vocab_size: int, **kwargs: Any
    ) -> None:
        self._update_base_metadata(mapping, lora_index_to_id, max_loras, vocab_size)
        self.is_prefill = mapping.is_prefill
        for buffer, slots in ((self._slots, self.token_lora_indices), (self._sampler_slots, self.sampler_indices)):
            buffer[: slots.shape[0]].copy_(slots)
            buffer[slots.shape[0] :].fill_(BASE)
        self.reft_slots.copy_(self._slots)
        self._named = self._slots.cpu().numpy().copy()  # vLLM doesn't call this again for an equal mapping

    def limit(
        self, positions: np.ndarray, from_end: np.ndarray, lora: np.ndarray, first: np.ndarray, last: np.ndarray
    ) -> None:
        """Leaves out, for either kind, the tokens that it doesn't act on. Call it after each `update_metadata`.

        Per token: its position in its prompt, and how many positions before the prompt's end it is (the last one: 1).
        Per slot: whether there is a LoRA in it, and on how many of the first and last positions its ReFT acts.
        """
        count = len(positions)
        slots = self._named[:count]
        on = slots != BASE
        reft = on & ((positions < first[slots]) | (from_end <= last[slots]))
        for buffer, acts in ((self._slots, on & lora[slots]), (self.reft_slots, reft)):
            buffer[:count].copy_(torch.from_numpy(np.where(acts, slots, BASE)))

    def add_lora_linear(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        lora_b_stacked: tuple[torch.Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        *,
        buffer: tuple[torch.Tensor, ...] | None = None,
        **kwargs: Any,
    ) -> None:
        y2, x2 = y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1])
        low_rank_delta_(
            y2,
            x2,
            [a.squeeze(1) for a in lora_a_stacked],
            [b.squeeze(1) for b in lora_b_stacked],
            self._slots[: x2.shape[0]],
            scale=scale,
        )

    def add_lora_logits(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: torch.Tensor,
        lora_b_stacked: torch.Tensor,
        scale: float,
        *,
        buffer: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        y2, x2 = y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1])
        low_rank_delta_(
            y2,
            x2,
            [lora_a_stacked.squeeze(1)],
            [lora_b_stacked.squeeze(1)],
            self._sampler_slots[: x2.shape[0]],
            scale=scale,
        )

    def add_shrink(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("shrink and expand are one operation here")

    def add_expand(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("shrink and expand are one operation here")

    def apply_lora_full_linear(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("adapters with whole modules (modules_to_save) are refused when they are added")

    def add_lora_embedding(
        self, y: torch.Tensor, x: torch.Tensor, lora_b_stacked: torch.Tensor, add_inputs: bool = True, **kwargs: Any
    ) -> None:
        """vLLM calls this for every model; no adapter that the catalog accepts has weights here."""
        slots, rank = lora_b_stacked.shape[0], x.shape[1]
        done = torch.eye(rank, dtype=lora_b_stacked.dtype, device=x.device).expand(slots, rank, rank)  # x is A's output
        low_rank_delta_(y, x, [done], [lora_b_stacked.squeeze(1)], self._slots[: x.shape[0]])


class GroupedLoRAModelManager(LRUCacheLoRAModelManager):
    """vLLM's slot cache with our punica wrapper, and with slots for ReFT in each decoder layer."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._lora = np.ones(self.lora_slots, dtype=bool)  # whether a LoRA is in the slot
        self._first = np.full(self.lora_slots, EVERY, dtype=np.int64)
        self._last = np.zeros(self.lora_slots, dtype=np.int64)

    def _init_punica_wrapper(self, max_num_batched_tokens: int, vllm_config: VllmConfig) -> None:
        super()._init_punica_wrapper(max_num_batched_tokens, vllm_config)
        self._punica = GroupedPunicaWrapper(
            max_num_batched_tokens, max_batches=self.max_num_seqs, device=self.device, lora_config=self.lora_config
        )
        self.punica_wrapper_mapping[DEFAULT_LANGUAGE_WRAPPER_KEY] = self._punica

    def _create_lora_modules(self) -> None:
        super()._create_lora_modules()
        self.decoder_layers = wrap_decoder_layers(self.model, self.lora_slots, self.lora_config)
        for layer in self.decoder_layers.values():
            self.register_module(layer.name, layer)
            layer.set_mapping(self._punica)

    def activate_adapter(self, lora_id: int) -> bool:
        activated: bool = super().activate_adapter(lora_id)
        if activated:
            slot = self.lora_index_to_id.index(lora_id)
            adapter = self._registered_adapters.cache[lora_id]
            reft: ReftConfig | None = getattr(adapter, "reft", None)
            self._lora[slot] = reft is None or len(adapter.loras) > len(reft.layers)
            self._first[slot], self._last[slot] = (reft.first, reft.last) if reft else (0, 0)
        return activated

    def place_tokens(self, positions: np.ndarray, prompts: np.ndarray) -> None:
        """Says where the step's tokens are: of each one its position in its request, and its prompt's length.

        Call it after `set_adapter_mapping`, in each step.
        """
        self._punica.limit(positions, prompts - positions, self._lora, self._first, self._last)


class GroupedWorkerLoRAManager(LRUCacheWorkerLoRAManager):
    """vLLM's adapter loader with our slot cache; it reads ReFT folders too."""

    _manager_cls = GroupedLoRAModelManager

    def _load_adapter(self, lora_request: Any) -> LoRAModel:
        folder = Path(lora_request.lora_path)
        files = adapter_files(folder)
        if REFT_CONFIG_FILE not in files:
            return super()._load_adapter(lora_request)
        reft = read_reft_config(folder)
        if CONFIG_FILE in files:
            model = super()._load_adapter(lora_request)
        else:
            model = LoRAModel(lora_request.lora_int_id, reft.rank, {})
        add_reft_weights(model, folder, reft, self._adapter_manager.decoder_layers, self.lora_config)
        model.reft = reft
        return model

    def place_tokens(self, positions: np.ndarray, prompts: np.ndarray) -> None:
        """See GroupedLoRAModelManager."""
        self._adapter_manager.place_tokens(positions, prompts)
