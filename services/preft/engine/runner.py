"""Our additions to vLLM's V1 model runner: requests that begin with output, and adapters on prompts alone.

An engine may get requests whose first tokens another engine has made. In the scheduler, `split_output` has marked these
tokens as output. The runner does the same before it refreshes its batch metadata, so that penalties, `min_tokens` and
seeds continue exactly.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.lora.request import LoRARequest
from vllm.platforms import current_platform
from vllm.v1.core.sched.output import SchedulerOutput

from preft.engine.numbers import FiniteRunner
from preft.engine.prompt_logprobs import PromptLogprobRunner
from preft.transfer.connector import output_so_far


class HandoverRunner(PromptLogprobRunner, FiniteRunner):
    """A mixin before a V1 model runner class. Uses `_may_reorder_batch`, `set_active_loras` and `load_lora_model`."""

    def _may_reorder_batch(self: Any, scheduler_output: SchedulerOutput) -> None:
        for request in scheduler_output.scheduled_new_reqs:
            if output := output_so_far(request.sampling_params):
                self._take_over(request.req_id, output)
        if current_platform.is_cpu() and any(state.generator is not None for state in self.requests.values()):
            self._spare_generators(scheduler_output)
        super()._may_reorder_batch(scheduler_output)  # type: ignore[misc]

    def _take_over(self: Any, request_id: str, tokens: list[int]) -> None:
        state = self.requests[request_id]
        state.output_token_ids.extend(tokens)  # in place: the batch refers to this list
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
        """Lets only rows whose token will count draw from their generators.

        After a chunk that doesn't complete its request's tokens, vLLM sets the generator back. On CPU a generator can't
        be set back, and the attempt kills the engine.
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
        rows = PromptRows(input_batch, num_scheduled_tokens)
        super().set_active_loras(rows, num_scheduled_tokens, *args)  # type: ignore[misc]
        self.lora_manager.place_tokens(rows.positions, rows.prompts)

    def load_lora_model(
        self: Any, model: torch.nn.Module, vllm_config: VllmConfig, device: torch.device
    ) -> torch.nn.Module:
        from vllm.model_executor.models import supports_lora

        from preft.engine.lora import GroupedWorkerLoRAManager

        if not supports_lora(model):
            raise ValueError(f"{type(model).__name__} does not support LoRA")
        self.lora_manager = GroupedWorkerLoRAManager(vllm_config, device, model.embedding_modules)
        return self.lora_manager.create_lora_manager(model, vllm_config)


class PromptRows:
    """A step's batch in which adapters act on prompt positions alone.

    Per token of the step, in the batch's order: its position in its request, and the length of that request's prompt.
    """

    def __init__(self, input_batch: Any, num_scheduled_tokens: np.ndarray) -> None:
        count, ends = len(num_scheduled_tokens), np.cumsum(num_scheduled_tokens)
        starts = input_batch.num_computed_tokens_cpu[:count]
        self.positions = np.arange(ends[-1]) + np.repeat(starts - ends + num_scheduled_tokens, num_scheduled_tokens)
        self.prompts = np.repeat(input_batch.num_prompt_tokens[:count], num_scheduled_tokens)
        self._batch = input_batch
        self._ends = ends

    def make_lora_inputs(
        self, num_scheduled_tokens: np.ndarray, num_sampled_tokens: np.ndarray
    ) -> tuple[tuple[int, ...], tuple[int, ...], set[LoRARequest]]:
        """See vLLM's InputBatch: adapters per sampled token and per scheduled token, and the adapters of this step."""
        sampled, scheduled, requests = self._batch.make_lora_inputs(num_scheduled_tokens, num_sampled_tokens)
        in_prompt = self.positions < self.prompts
        scheduled = np.where(in_prompt, scheduled, 0)
        sampled = np.where(np.repeat(in_prompt[self._ends - 1], num_sampled_tokens), sampled, 0)
        acting = set(scheduled.tolist())
        return (
            tuple(sampled.tolist()),
            tuple(scheduled.tolist()),
            {request for request in requests if request.lora_int_id in acting},
        )


def advance_generator(generator: torch.Generator, draws: int, vocab_size: int, device: torch.device) -> None:
    """Moves a request's generator past `draws` sampled tokens, as this platform's sampler would.

    CPU: one 31-bit integer per token (a seed for its Gumbel noise). Otherwise: one exponential per vocabulary entry.
    """
    for _ in range(draws):
        if current_platform.is_cpu():
            torch.randint(0, 2**31, (1,), generator=generator, dtype=torch.long)
        else:
            torch.empty(vocab_size, device=device).exponential_(generator=generator)
