"""Adapters inside vLLM: a punica wrapper over our own kernels, and the managers that install it and fill its slots.

Extension points used: `LRUCacheWorkerLoRAManager._manager_cls` and `add_adapter`; `LoRAModelManager`'s
`_init_punica_wrapper`, `_create_lora_modules`, `_add_adapter` and `activate_adapter`; the `PunicaWrapperBase`
interface. The stock CPU wrapper takes slot -1 (no adapter) for the last slot, so a base request in a mixed batch gets
another tenant's adapter. This wrapper leaves tokens without an adapter unchanged.

Weights come from host memory that the engine shares with its worker, and are copied straight into a slot. No step reads
a disk, and this module keeps no copy.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.model_manager import DEFAULT_LANGUAGE_WRAPPER_KEY, LRUCacheLoRAModelManager
from vllm.lora.punica_wrapper.punica_base import PunicaWrapperBase
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

from preft.adapters.formats.reft_config import EVERY, ReftConfig
from preft.adapters.formats.tensor_names import HEAD
from preft.engine.adapter_weights import AdapterWeights, LoraPart, read_weights
from preft.engine.head import wrap_head
from preft.engine.reft import wrap_decoder_layers
from preft.memory.arena import Region, StagingView
from preft_kernels.low_rank_delta import low_rank_delta_
from preft_kernels.residual_delta import residual_delta_
from preft_kernels.token_groups import BASE, RANK_STEP, TokenGroups


class GroupedPunicaWrapper(PunicaWrapperBase):
    """Applies adapters to the tokens that name them, grouped by slot; other tokens stay unchanged.

    `lora` and `reft` are persistent buffers for the largest batch, refilled in each step, so that compiled graphs can
    refer to them. The two differ for adapters without LoRA, and for tokens at positions where the adapter's ReFT
    doesn't act. `head` groups the rows from which a token is sampled, for adapters with a LoRA on the output layer.
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
        """`slots` adapters at a time, each of rank `rank` at most."""
        super().__init__(max_num_batched_tokens, max_batches, device)
        self.lora, self.reft = (TokenGroups(max_num_batched_tokens, slots, rank, device) for _ in range(2))
        self.head = TokenGroups(max_batches, slots, rank, device)
        self._lora_ranks, self._reft_ranks = np.full(slots, rank), np.full(slots, rank)
        self._head_ranks = np.zeros(slots, dtype=np.int64)
        self._first, self._last = np.full(slots, EVERY), np.zeros(slots, dtype=np.int64)
        self._named = np.empty(0, dtype=np.int64)
        self._scored: int | None = None  # within `scores_prompt_of`: the slot of the adapter of all rows, or BASE

    def hold(self, slot: int, lora_rank: int, reft: ReftConfig | None, head_rank: int = 0) -> None:
        """Declares the content of a slot: a LoRA of at most `lora_rank` (0: none), a ReFT, or both.

        `head_rank` is the rank of the output layer's LoRA, 0 if there is none.
        """
        self._lora_ranks[slot] = lora_rank
        self._head_ranks[slot] = head_rank
        self._reft_ranks[slot] = reft.rank if reft else 0
        self._first[slot], self._last[slot] = (reft.first, reft.last) if reft else (0, 0)

    def update_metadata(
        self, mapping: Any, lora_index_to_id: list[int | None], max_loras: int, vocab_size: int, **kwargs: Any
    ) -> None:
        self._update_base_metadata(mapping, lora_index_to_id, max_loras, vocab_size)
        self.is_prefill = mapping.is_prefill
        slot_of = {lora_id: slot for slot, lora_id in enumerate(lora_index_to_id) if lora_id is not None} | {0: BASE}
        ids = mapping.index_mapping
        # Kept for `limit`: vLLM doesn't call this method again for an equal mapping.
        self._named = np.fromiter((slot_of[lora_id] for lora_id in ids), dtype=np.int64, count=len(ids))
        self.lora.set(self._acting(self._named, self._lora_ranks), self._lora_ranks)
        self.reft.set(self._acting(self._named, self._reft_ranks), self._reft_ranks)
        sampled = np.fromiter((slot_of[lora_id] for lora_id in mapping.prompt_mapping), dtype=np.int64)
        self.head.set(self._acting(sampled, self._head_ranks), self._head_ranks)

    def limit(self, positions: np.ndarray, from_end: np.ndarray) -> None:
        """Excludes the tokens on which their ReFT doesn't act. Call it after each `update_metadata`.

        Per token: its position in its prompt, and its distance to the prompt's end (1 for the last position).
        """
        slots = self._named[: len(positions)]
        inside = (positions < self._first[slots]) | (from_end <= self._last[slots])
        self.reft.set(self._acting(np.where(inside, slots, BASE), self._reft_ranks), self._reft_ranks)

    @staticmethod
    def _acting(slots: np.ndarray, ranks: np.ndarray) -> np.ndarray:
        """`slots`, with BASE in place of slots that hold nothing of this kind."""
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

    def add_shrink(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("shrink and expand are one operation here")

    def add_expand(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("shrink and expand are one operation here")

    def apply_lora_full_linear(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("adapters with whole modules (modules_to_save) are refused when they are added")

    def add_lora_logits(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        lora_b_stacked: tuple[torch.Tensor, ...],
        scale: float,
        **kwargs: Any,
    ) -> None:
        """Rows are those from which a token is sampled. An adapter acts only on its prompt's last token.

        Within `scores_prompt_of`, rows are any of one prompt.
        """
        a, b = ([stack.squeeze(1) for stack in stacks] for stacks in (lora_a_stacked, lora_b_stacked))
        if self._scored == BASE:
            return
        if self._scored is not None:
            rank = int(self._head_ranks[self._scored])
            down, up = a[0][self._scored, :rank].float(), b[0][self._scored, :, :rank].float()
            y += (scale * (x.float() @ down.T) @ up.T).to(y.dtype)
            return
        low_rank_delta_(y, x, a, b, self.head, scale=scale)

    @contextmanager
    def scores_prompt_of(self, slot: int) -> Iterator[None]:
        """Within the context, all logits are those of one prompt's tokens, under the adapter in `slot`, or BASE."""
        self._scored = slot
        try:
            yield
        finally:
            self._scored = None

    def add_lora_embedding(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("adapters of the embedding are refused when they are added")


class GroupedLoRAModelManager(LRUCacheLoRAModelManager):
    """vLLM's slot cache with our punica wrapper, with ReFT slots in each decoder layer, and filled by us.

    Its capacity for adapters equals the number of slots, so each registered adapter is in a slot.
    """

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
        self.places = {name: (name, 0) for name in self.modules} | {
            part: (name, index) for name, parts in self.packed_modules.items() for index, part in enumerate(parts)
        }
        self._decoder_layers = wrap_decoder_layers(self.model, self.lora_slots, self.lora_config)
        self._written: defaultdict[int, set[str]] = defaultdict(set)  # by slot: modules that ever had a LoRA in it
        for layer in self._decoder_layers.values():
            self.register_module(layer.name, layer)
            layer.set_mapping(self._punica)
        self._head = wrap_head(self.model, self.lora_slots, self.lora_config)
        if self._head is not None:
            self.register_module(HEAD, self._head)
            self._head.set_mapping(self._punica)
            self.places[HEAD] = (HEAD, 0)
        self._launch_kernels_once()

    def _launch_kernels_once(self) -> None:
        """Launches the kernels for each kind of layer and for steps of any length, without adapters.

        On GPU the first launch of a kind compiles the kernel for about a second, and no prompt should wait for that.
        """
        linear = {
            tuple(stack.shape for stack in (*module.lora_a_stacked, *module.lora_b_stacked)): module
            for module in self.modules.values()
            if isinstance(module, BaseLinearLayerWithLoRA)
        }
        lengths = [1 << power for power in range((len(self._punica.lora.order) - 1).bit_length() + 1)]
        for module in linear.values():
            a, b = module.lora_a_stacked, module.lora_b_stacked
            x, y = (a[0].new_empty(1, size) for size in (a[0].shape[-1], sum(stack.shape[-2] for stack in b)))
            for tokens in lengths:
                self._punica.add_lora_linear(
                    y.expand(tokens, -1), x.expand(tokens, -1), a, b, 1.0, module.output_slices
                )
        if self._head is not None:
            a, b = self._head.lora_a_stacked, self._head.lora_b_stacked
            x, y = a[0].new_empty(1, a[0].shape[-1]), a[0].new_empty(1, b[0].shape[-2])
            for tokens in (count for count in lengths if count <= len(self._punica.head.order)):
                self._punica.add_lora_logits(y.expand(tokens, -1), x.expand(tokens, -1), a, b, 1.0)
        for layer in list(self._decoder_layers.values())[:1]:
            stream = layer.a.new_empty(1, layer.a.shape[-1])
            for tokens in lengths:
                rows = stream.expand(tokens, -1)
                residual_delta_(rows, rows, layer.a, layer.b, layer.c, self._punica.reft)

    def check(self, weights: AdapterWeights) -> None:
        """Raises ValueError if this model can't take the weights."""
        for layer in weights.reft:
            if layer not in self._decoder_layers:
                raise ValueError(f"the served model has no decoder layer {layer} that takes ReFT")
        rank = max(weights.lora_rank, weights.reft_config.rank if weights.reft_config else 0)
        if rank > self.lora_config.max_lora_rank:
            raise ValueError(f"its rank {rank} is more than the largest served rank {self.lora_config.max_lora_rank}")

    def _add_adapter(self, lora: Any) -> None:
        if isinstance(lora, AdapterWeights):
            self._registered_adapters[lora.id] = lora
        else:  # vLLM's own adapter of zeros, for its trial runs
            super()._add_adapter(lora)

    def activate_adapter(self, lora_id: int) -> bool:
        weights: Any = self._registered_adapters.cache[lora_id]
        if lora_id in self._active_adapters or not isinstance(weights, AdapterWeights):
            activated: bool = super().activate_adapter(lora_id)
            return activated
        if not (weights.lora or weights.reft):
            raise RuntimeError(f"adapter {lora_id} has left its slot, and its weights are elsewhere")
        slot = self.lora_index_to_id.index(None)
        self._fill(slot, weights)
        self._active_adapters[lora_id] = None
        self.lora_index_to_id[slot] = lora_id
        self._punica.hold(slot, weights.lora_rank, weights.reft_config, weights.head_rank)
        return True

    def _fill(self, slot: int, weights: AdapterWeights) -> None:
        """Writes the slot's stacks: as many ranks as the adapter has, and zeros where a part has fewer."""
        self._written[slot] |= weights.lora.keys()
        rank = min(-(-weights.lora_rank // RANK_STEP) * RANK_STEP, self.lora_config.max_lora_rank)
        for name in self._written[slot]:
            _fill_module(self.modules[name], slot, rank, weights.lora.get(name, {}))
        for number, layer in self._decoder_layers.items():
            if number in weights.reft:
                part = weights.reft[number]
                layer.set_reft(slot, part.a, part.b, part.c)
            elif weights.reft:
                layer.reset_lora(slot)

    def place_tokens(self, positions: np.ndarray, prompts: np.ndarray) -> None:
        """Sets each token's position in its request, and its prompt's length.

        Call it after `set_adapter_mapping`, in each step.
        """
        self._punica.limit(positions, prompts - positions)

    def scores_prompt_of(self, lora_id: int | None) -> AbstractContextManager[None]:
        """Within the context, all logits are those of one prompt's tokens, under this adapter, which is in a slot.

        None is the base model. Without the context, rows of logits are taken for those of the step's sampled tokens.
        """
        return self._punica.scores_prompt_of(BASE if lora_id is None else self.lora_index_to_id.index(lora_id))


def _pin(memory: memoryview) -> None:
    """Page-locks the memory for CUDA, so that copies to the GPU need no intermediate buffer."""
    address = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
    torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(address, len(memory), 0))


def _fill_module(module: Any, slot: int, rank: int, parts: dict[int, LoraPart]) -> None:
    for index in range(len(module.lora_a_stacked)):
        part = parts.get(index)
        a, b = module.lora_a_stacked[index][slot, 0], module.lora_b_stacked[index][slot, 0]
        own = part.a.shape[0] if part else 0
        if part:
            a[:own].copy_(part.a, non_blocking=True)
            b[:, :own].copy_(part.b, non_blocking=True)
            if part.scaling != 1:
                b[:, :own].mul_(part.scaling)
        a[own:rank].zero_()
        b[:, own:rank].zero_()


class GroupedWorkerLoRAManager(LRUCacheWorkerLoRAManager):
    """Takes adapters from the host memory of this engine's worker when a step needs them."""

    _manager_cls = GroupedLoRAModelManager

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._memory: StagingView | None = None
        self._regions: dict[int, Region] = {}  # by vLLM's id

    def place_adapter(self, lora_id: int, path: str, region: Region) -> bool:
        """Notes that the adapter lies in `region` of the arena at `path`. Checks the adapter, but fills no slot.

        Returns whether the adapter acts on positions that are counted from a prompt's end. Raises ValueError or
        InvalidAdapter for an adapter that can't be served, and StaleRegion if the region is gone.
        """
        if self._memory is None:
            self._memory = StagingView(path)
            if self.device.type == "cuda":
                _pin(self._memory.memory)
        with self._memory.hold(region) as memory:
            weights = self._read(lora_id, memory)
            self._adapter_manager.check(weights)
            config = weights.reft_config
        self._regions[lora_id] = region
        return config is not None and config.last > 0

    def forget_adapters(self, lora_ids: Sequence[int]) -> None:
        """Forgets adapters whose memory is gone. Their ids are never used again."""
        for lora_id in lora_ids:
            self._regions.pop(lora_id, None)

    def add_adapter(self, lora_request: Any) -> bool:
        """vLLM calls this in each step for each adapter of the step. The worker keeps these adapters in memory."""
        lora_id, manager = lora_request.lora_int_id, self._adapter_manager
        if lora_id in self.list_adapters():
            manager.get_adapter(lora_id)  # counts as a use, like the next line
            manager.activate_adapter(lora_id)
            return True
        region = self._regions[lora_id]
        assert self._memory is not None
        with self._memory.hold(region) as memory:
            weights = self._read(lora_id, memory)
            if len(manager) >= manager.capacity:
                manager.remove_oldest_adapter()
            manager.add_adapter(weights)
            manager.activate_adapter(lora_id)
            if self.device.type == "cuda":
                torch.cuda.current_stream().synchronize()  # after `hold`, the memory may be overwritten
        weights.drop()
        return True

    def _read(self, lora_id: int, memory: memoryview) -> AdapterWeights:
        manager = self._adapter_manager
        mapper = getattr(manager.model, "hf_to_vllm_mapper", None)
        mapper = mapper.get_rename_mapper() if mapper is not None else None
        return read_weights(lora_id, memory, manager.places.get, mapper, self.lora_config.max_lora_rank)

    def place_tokens(self, positions: np.ndarray, prompts: np.ndarray) -> None:
        """See `GroupedLoRAModelManager.place_tokens`."""
        self._adapter_manager.place_tokens(positions, prompts)

    def scores_prompt_of(self, lora_id: int | None) -> AbstractContextManager[None]:
        """See `GroupedLoRAModelManager.scores_prompt_of`."""
        context: AbstractContextManager[None] = self._adapter_manager.scores_prompt_of(lora_id)
        return context
