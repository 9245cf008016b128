"""Our LoRA application inside vLLM: a punica wrapper over our own kernel, and the managers that install it.

Extension points used: `LRUCacheWorkerLoRAManager._manager_cls`, `LoRAModelManager._init_punica_wrapper`, and the
`PunicaWrapperBase` interface. The stock CPU wrapper takes slot -1 (no adapter) for the last slot, so that a base
request in a mixed batch gets another tenant's adapter; this one leaves such tokens alone.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.lora.model_manager import DEFAULT_LANGUAGE_WRAPPER_KEY, LRUCacheLoRAModelManager
from vllm.lora.punica_wrapper.punica_base import PunicaWrapperBase
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

from preft_kernels.low_rank_delta import BASE, low_rank_delta_


class GroupedPunicaWrapper(PunicaWrapperBase):
    """Applies adapters to the tokens that name them, grouped by slot; every other token is untouched.

    `_slots` is one persistent buffer over the largest batch, refilled on the host each step with the tail set to BASE,
    so that compiled graphs may hold on to it.
    """

    def __init__(
        self, max_num_batched_tokens: int, max_batches: int, device: torch.device | str, **kwargs: Any
    ) -> None:
        super().__init__(max_num_batched_tokens, max_batches, device)
        self._slots = torch.full((max_num_batched_tokens,), BASE, dtype=torch.int32, device=device)
        self._sampler_slots = torch.full((max_num_batched_tokens,), BASE, dtype=torch.int32, device=device)

    def update_metadata(
        self, mapping: Any, lora_index_to_id: list[int | None], max_loras: int, vocab_size: int, **kwargs: Any
    ) -> None:
        self._update_base_metadata(mapping, lora_index_to_id, max_loras, vocab_size)
        self.is_prefill = mapping.is_prefill
        for buffer, slots in ((self._slots, self.token_lora_indices), (self._sampler_slots, self.sampler_indices)):
            buffer[: slots.shape[0]].copy_(slots)
            buffer[slots.shape[0] :].fill_(BASE)

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
    """vLLM's slot cache with our punica wrapper."""

    def _init_punica_wrapper(self, max_num_batched_tokens: int, vllm_config: VllmConfig) -> None:
        super()._init_punica_wrapper(max_num_batched_tokens, vllm_config)
        self.punica_wrapper_mapping[DEFAULT_LANGUAGE_WRAPPER_KEY] = GroupedPunicaWrapper(
            max_num_batched_tokens, max_batches=self.max_num_seqs, device=self.device, lora_config=self.lora_config
        )


class GroupedWorkerLoRAManager(LRUCacheWorkerLoRAManager):
    """vLLM's adapter loader with our slot cache."""

    _manager_cls = GroupedLoRAModelManager
