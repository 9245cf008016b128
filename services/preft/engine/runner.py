"""What our model runner adds to vLLM's V1 runner: it takes over requests in mid-generation, and applies our LoRA.

A decode engine gets requests whose first tokens were made elsewhere. The scheduler side of the KV connector has told
the scheduler that they are output; here the runner learns the same, before its batch metadata is refreshed, so that
penalties, `min_tokens` and seeds continue exactly. (The V2 runner takes such requests as they are: its request state
already distinguishes prompt from prefilled output.)
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.v1.core.sched.output import SchedulerOutput

from preft.transfer.connector import KvMetadata


class HandoverRunner:
    """Mixed in before a V1 model runner class. Uses `_may_reorder_batch`, `set_active_loras` and `load_lora_model`."""

    def _may_reorder_batch(self: Any, scheduler_output: SchedulerOutput) -> None:
        metadata = scheduler_output.kv_connector_metadata
        if isinstance(metadata, KvMetadata):
            for load in metadata.loads:
                if load.request_id in self.requests and not self.requests[load.request_id].output_token_ids:
                    self._take_over(load.request_id, list(load.output_token_ids))
        if current_platform.is_cpu() and any(state.generator is not None for state in self.requests.values()):
            self._spare_generators(scheduler_output)
        super()._may_reorder_batch(scheduler_output)  # type: ignore[misc]

    def _take_over(self: Any, request_id: str, tokens: list[int]) -> None:
        state = self.requests[request_id]
        state.output_token_ids.extend(tokens)  # the batch refers to this very list
        batch = self.input_batch
        row = batch.req_id_to_index[request_id]
        start = int(batch.num_prompt_tokens[row])
        end = start + len(tokens)
        batch.token_ids_cpu[row, start:end] = tokens
        batch.is_token_ids[row, start:end] = True
        batch.num_tokens_no_spec[row] = end
        if state.generator is not None:
            advance_generator(state.generator, len(tokens), batch.vocab_size, self.device)

    def _spare_generators(self: Any, scheduler_output: SchedulerOutput) -> None:
        """Lets only those rows draw from their generators whose token will count.

        After a chunk that doesn't end its request's tokens vLLM winds the generator back, which kills the engine on
        CPU: these generators can't be.
        """
        batch = self.input_batch
        for request_id, scheduled in scheduler_output.num_scheduled_tokens.items():
            state = self.requests[request_id]
            if state.generator is None:
                continue
            if state.num_computed_tokens + scheduled < state.num_tokens:
                batch.generators.pop(batch.req_id_to_index[request_id], None)
            else:
                batch.generators[batch.req_id_to_index[request_id]] = state.generator

    def set_active_loras(self: Any, input_batch: Any, num_scheduled_tokens: np.ndarray, *args: Any) -> None:
        super().set_active_loras(input_batch, num_scheduled_tokens, *args)  # type: ignore[misc]
        if current_platform.is_cpu():
            count = len(num_scheduled_tokens)
            self.lora_manager.place_tokens(
                input_batch.num_computed_tokens_cpu[:count],
                num_scheduled_tokens,
                input_batch.num_prompt_tokens[:count],
            )

    def load_lora_model(
        self: Any, model: torch.nn.Module, vllm_config: VllmConfig, device: torch.device
    ) -> torch.nn.Module:
        from vllm.model_executor.models import supports_lora

        from preft.engine.lora import GroupedWorkerLoRAManager

        if not current_platform.is_cpu():
            return super().load_lora_model(model, vllm_config, device)  # type: ignore[misc]
        if not supports_lora(model):
            raise ValueError(f"{type(model).__name__} does not support LoRA")
        self.lora_manager = GroupedWorkerLoRAManager(vllm_config, device, model.embedding_modules)
        return self.lora_manager.create_lora_manager(model, vllm_config)


def advance_generator(generator: torch.Generator, draws: int, vocab_size: int, device: torch.device) -> None:
    """Moves a request's generator past `draws` sampled tokens, as the sampler of this platform would have.

    CPU: one 31-bit integer per token (a seed for its Gumbel noise); otherwise: one exponential per vocabulary entry.
    """
    for _ in range(draws):
        if current_platform.is_cpu():
            torch.randint(0, 2**31, (1,), generator=generator, dtype=torch.long)
        else:
            torch.empty(vocab_size, device=device).exponential_(generator=generator)
