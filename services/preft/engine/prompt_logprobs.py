"""Log probabilities of prompt tokens inside vLLM, with the prompt's adapter in the output layer and in little memory.

vLLM's own code computes the logits of all of a step's prompt tokens at once: 8,192 tokens of a 150,000-token vocabulary
are 5 GB, and an engine without that memory dies. It also leaves out an adapter's LoRA on the output layer. This module
computes the same values slice by slice. Rows with logits that aren't finite become NaN, and end their request.

Extension point used: the V1 runner's `_get_prompt_logprobs_dict`. vLLM's scheduler and output processor do the rest,
and a request with prompt log probabilities reads no prefix cache.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping
from typing import Any

import torch
from vllm.logprobs import FlatLogprobs
from vllm.v1.outputs import LogprobsTensors

from preft.core.request import PromptLogprobs
from preft.engine.numbers import bad_logits

SLICE_BYTES = 64 << 20  # of float32 logits; their log probabilities take as much again


class PromptLogprobRunner:
    """A mixin; put it before a V1 model runner class. Uses `lora_manager`, so the engine must have adapters."""

    def _get_prompt_logprobs_dict(
        self: Any, hidden_states: torch.Tensor, num_scheduled_tokens: Mapping[str, int]
    ) -> dict[str, LogprobsTensors | None]:
        """The values of the requests whose prompts this step completes; those of other prompts are kept for later.

        `hidden_states` is [scheduled tokens, hidden size].
        """
        complete: dict[str, LogprobsTensors | None] = {}
        for request_id, top in list(self.num_prompt_logprobs.items()):
            scheduled = num_scheduled_tokens.get(request_id)
            if scheduled is None:
                continue  # it waits, or was preempted
            state = self.requests[request_id]
            rows = len(state.prompt_token_ids) - 1
            if state.in_progress_prompt_logprobs_cpu is None:
                state.in_progress_prompt_logprobs_cpu = LogprobsTensors.empty_cpu(rows, top + 1)
            start, end = state.num_computed_tokens, state.num_computed_tokens + scheduled
            self._score_prompt(request_id, top, hidden_states, start, min(end, rows))
            if end > rows:
                complete[request_id] = state.in_progress_prompt_logprobs_cpu
                state.in_progress_prompt_logprobs_cpu = None
                del self.num_prompt_logprobs[request_id]
        if complete:
            self._sync_device()
        return complete

    def _score_prompt(self: Any, request_id: str, top: int, hidden_states: torch.Tensor, start: int, end: int) -> None:
        """Writes the rows from `start` to `end`. Row i is about prompt token i + 1, and comes from position i."""
        if start >= end:
            return
        state = self.requests[request_id]
        first = int(self.query_start_loc.np[self.input_batch.req_id_to_index[request_id]]) - start
        tokens = torch.tensor(state.prompt_token_ids[start + 1 : end + 1], device=self.device)
        size = max(1, SLICE_BYTES // (4 * self.model_config.get_vocab_size()))
        lora = state.lora_request
        with self.lora_manager.scores_prompt_of(lora.lora_int_id if lora is not None else None):
            for row in range(start, end, size):
                rows = slice(row, min(row + size, end))
                logits = self.model.compute_logits(hidden_states[first + rows.start : first + rows.stop])
                scores = self.sampler.compute_logprobs(logits)
                scores[bad_logits(logits)] = math.nan
                targets = tokens[rows.start - start : rows.stop - start]
                token_ids, logprobs, ranks = self.sampler.gather_logprobs(scores, top, targets)[:3]
                kept = state.in_progress_prompt_logprobs_cpu
                kept.logprob_token_ids[rows].copy_(token_ids, non_blocking=True)
                kept.logprobs[rows].copy_(logprobs, non_blocking=True)
                kept.selected_token_ranks[rows].copy_(ranks, non_blocking=True)


def prompt_logprobs_of(flat: FlatLogprobs, top: int) -> PromptLogprobs:
    """vLLM's values of one prompt in our form. vLLM has an empty row for the first token."""
    return PromptLogprobs(
        top, array("I", flat.token_ids), array("f", flat.logprobs), array("I", flat.ranks[:: top + 1])
    )


def are_numbers(logprobs: PromptLogprobs) -> bool:
    """Whether all values can be log probabilities. Minus infinity can."""
    return all(value < math.inf for value in logprobs.logprobs)
