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
from preft_kernels.low_rank_delta import low_rank_delta_
from preft_kernels.token_groups import BASE, TokenGroups


class GroupedPunicaWrapper(PunicaWrapperBase):
    """Applies adapters to the tokens that name them, grouped by slot; every other token is untouched.

    `lora`, `reft` and the sampler's groups are persistent buffers over the largest batch, refilled each step, so that
    compiled graphs may hold on to them. They differ where an adapter has no LoRA, or has no ReFT that acts on the
    token's position.
    """

    def __init__(
        self,
        max_num_batched_tokens: int,
        max_batches: int,
        device: torch.device | str,
        *,
        slots: int,
        rank: int,
        **kwargs: Any,
    ) -> None:
        """`slots` adapters at a time, of `rank` at most."""
        super().__init__(max_num_batched_tokens, max_batches, device)
        self.lora, self.reft, self._sampler = (
            TokenGroups(max_num_batched_tokens, slots, rank, device) for _ in range(3)
        )
        self._lora_ranks, self._reft_ranks = np.full(slots, rank), np.full(slots, rank)
        self._first, self._last = np.full(slots, EVERY), np.zeros(slots, dtype=np.int64)
        self._named = np.empty(0, dtype=np.int64)

    def hold(self, slot: int, lora_rank: int, reft: ReftConfig | None) -> None:
        """Says what is in a slot from now on: a LoRA of at most this rank (0: none), a ReFT, or both."""
        self._lora_ranks[slot] = lora_rank
        self._reft_ranks[slot] = reft.rank if reft else 0
        self._first[slot], self._last[slot] = (reft.first, reft.last) if reft else (0, 0)

    def update_metadata(
        self, mapping: Any, lora_index_to_id: list[int | None], max_loras: int, vocab_size: int, **kwargs: Any
    ) -> None:
        self._update_base_metadata(mapping, lora_index_to_id, max_loras, vocab_size)
        self.is_prefill = mapping.is_prefill
        slot_of = {lora_id: slot for slot, lora_id in enumerate(lora_index_to_id) if lora_id is not None} | {0: BASE}
        self._named, sampled = (
            np.fromiter((slot_of[lora_id] for lora_id in ids), dtype=np.int64, count=len(ids))
            for ids in (mapping.index_mapping, mapping.prompt_mapping)
        )  # kept: vLLM doesn't call this again for an equal mapping
        self._sampler.set(self._acting(sampled, self._lora_ranks), self._lora_ranks)
        self.lora.set(self._acting(self._named, self._lora_ranks), self._lora_ranks)
        self.reft.set(self._acting(self._named, self._reft_ranks), self._reft_ranks)

    def limit(self, positions: np.ndarray, from_end: np.ndarray) -> None:
        """Leaves out the tokens that their ReFT doesn't act on. Call it after each `update_metadata`.

        Per token: its position in its prompt, and how many positions before the prompt's end it is (the last one: 1).
        """
        slots = self._named[: len(positions)]
        inside = (positions < self._first[slots]) | (from_end <= self._last[slots])
        self.reft.set(self._acting(np.where(inside, slots, BASE), self._reft_ranks), self._reft_ranks)

    @staticmethod
    def _acting(slots: np.ndarray, ranks: np.ndarray) -> np.ndarray:
        """`slots` without those that hold nothing of this kind."""
        return np.where((slots != BASE) & (ranks[slots] > 0), slots, BASE)

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
        low_rank_delta_(
            y.view(-1, y.shape[-1]),
            x.view(-1, x.shape[-1]),
            [a.squeeze(1) for a in lora_a_stacked],
            [b.squeeze(1) for b in lora_b_stacked],
            self.lora,
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
        low_rank_delta_(
            y.view(-1, y.shape[-1]),
            x.view(-1, x.shape[-1]),
            [lora_a_stacked.squeeze(1)],
            [lora_b_stacked.squeeze(1)],
            self._sampler,
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
        low_rank_delta_(y, x, [done], [lora_b_stacked.squeeze(1)], self.lora)


class GroupedLoRAModelManager(LRUCacheLoRAModelManager):
    """vLLM's slot cache with our punica wrapper, and with slots for ReFT in each decoder layer."""

    def _init_punica_wrapper(self, max_num_batched_tokens: int, vllm_config: VllmConfig) -> None:
        super()._init_punica_wrapper(max_num_batched_tokens, vllm_config)
        self._punica = GroupedPunicaWrapper(
            max_num_batched_tokens,
            max_batches=self.max_num_seqs,
            device=self.device,
            slots=self.lora_slots,
            rank=self.lora_config.max_lora_rank,
        )
        self.punica_wrapper_mapping[DEFAULT_LANGUAGE_WRAPPER_KEY] = self._punica

    def _create_lora_modules(self) -> None:
        super()._create_lora_modules()
        self.decoder_layers = wrap_decoder_layers(self.model, self.lora_slots, self.lora_config)
        self._reft_names = {layer.name for layer in self.decoder_layers.values()}
        for layer in self.decoder_layers.values():
            self.register_module(layer.name, layer)
            layer.set_mapping(self._punica)

    def activate_adapter(self, lora_id: int) -> bool:
        activated: bool = super().activate_adapter(lora_id)
        if activated:
            slot = self.lora_index_to_id.index(lora_id)
            adapter = self._registered_adapters.cache[lora_id]
            reft: ReftConfig | None = getattr(adapter, "reft", None)
            ranks = [_rank_of(weights) for name, weights in adapter.loras.items() if name not in self._reft_names]
            self._punica.hold(slot, max(ranks, default=0), reft)
        return activated

    def place_tokens(self, positions: np.ndarray, prompts: np.ndarray) -> None:
        """Says where the step's tokens are: of each one its position in its request, and its prompt's length.

        Call it after `set_adapter_mapping`, in each step.
        """
        self._punica.limit(positions, prompts - positions)


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


def _rank_of(weights: Any) -> int:
    """The highest rank of a module's LoRA: PEFT's rank_pattern may give it another than the adapter's."""
    stacks = weights.lora_a if isinstance(weights.lora_a, list | tuple) else [weights.lora_a]
    return max((stack.shape[0] for stack in stacks if stack is not None), default=0)
