"""LoRA on the output layer inside vLLM. For each request it changes one row: the logits of its first output token.

The punica wrapper selects these rows. Extension point used: `LogitsProcessorWithLoRA`, with our own stacks, because
vLLM refuses vocabularies above 258,048. If the model ties embedding and output layer, only the output layer changes, as
in PEFT.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.config.lora import LoRAConfig
from vllm.lora.layers.logits_processor import LogitsProcessorWithLoRA
from vllm.lora.utils import replace_submodule
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding


class HeadLayer(LogitsProcessorWithLoRA):
    """The step from hidden states to logits, with each sampled row's own LoRA. Its stacks are those of a linear layer.

    On GPU the stacks take slots * rank * (hidden + vocabulary) elements; on CPU a page takes memory once it is written.
    """

    def create_lora_weights(self, max_loras: int, lora_config: LoRAConfig, model_config: Any = None) -> None:
        rank, options = lora_config.max_lora_rank, {"dtype": lora_config.lora_dtype, "device": self.device}
        self.lora_a_stacked = (torch.zeros(max_loras, 1, rank, self.hidden_size, **options),)
        self.lora_b_stacked = (torch.zeros(max_loras, 1, self.base_layer.vocab_size, rank, **options),)
        self.sharded_to_full_mapping_gpu = None
        self.tp_size = 1  # the LoRA acts on whole logits, so each worker holds the whole LoRA

    def reset_lora(self, index: int) -> None:
        for stack in (*self.lora_a_stacked, *self.lora_b_stacked):
            stack[index] = 0

    def set_lora(self, index: int, lora_a: Any, lora_b: Any) -> None:
        raise NotImplementedError("the manager fills this layer's slots")

    def _get_logits(
        self, hidden_states: torch.Tensor, lm_head: VocabParallelEmbedding, *args: Any, **kwargs: Any
    ) -> Any:
        logits = self.base_layer._get_logits(hidden_states, lm_head, *args, **kwargs)
        if logits is not None:
            self.punica_wrapper.add_lora_logits(logits, hidden_states, self.lora_a_stacked, self.lora_b_stacked, 1.0)
        return logits


def wrap_head(model: torch.nn.Module, slots: int, config: LoRAConfig) -> HeadLayer | None:
    """Wraps the logits processor of `model` in a HeadLayer and returns it; None if the model has no plain one."""
    processor = getattr(model, "logits_processor", None)
    weight = getattr(getattr(model, "lm_head", None), "weight", None)
    if weight is None:
        weight = getattr(getattr(getattr(model, "model", None), "embed_tokens", None), "weight", None)
    if not isinstance(processor, LogitsProcessor) or weight is None:
        return None
    layer = HeadLayer(processor, weight.shape[1], weight.dtype, weight.device, None)
    layer.create_lora_weights(slots, config)
    replace_submodule(model, "logits_processor", layer)
    return layer
