"""Keeps NaN and infinity of one request out of all other requests' answers, and ends that request with an error.

The module owns three rules. A KV block is zeroed before a request gets it: attention multiplies the slots behind a
request's last token by zero, and zero times NaN is NaN. A block is checked when it is full, and a prompt's last block
when the prompt is computed. A request with a block or a logit that isn't finite ends before its token leaves, and its
blocks leave the prefix cache.

The worker side (`FiniteRunner`) finds such requests, and the scheduler side (`FiniteScheduler`) ends them. vLLM's own
count of NaN per request (`VLLM_COMPUTE_NANS_IN_LOGITS`) carries the finding between the two. Extension points used:
`KVCacheConfig.needs_kv_cache_zeroing`, `Scheduler.update_from_output`; the V1 runner's `initialize_kv_cache_tensors`,
`_zero_block_ids`, `sample_tokens` and `_bookkeeping_sync`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import RequestStatus

from preft_kernels.kv_blocks import KvBlocks, on_device

ENVIRONMENT = {"VLLM_COMPUTE_NANS_IN_LOGITS": "1", "VLLM_RAISE_ON_LOGIT_NANS": "0"}
"""The environment of an engine's processes. With the second variable at 1, a NaN would end the engine."""
NOT_FINITE = "numbers_not_finite"
"""The `stop_reason` of a request that this module has ended."""


class BlockNumbers:
    """The KV blocks of an engine that hold NaN or infinity, from the checks since each block was zeroed."""

    def __init__(self, blocks: KvBlocks, num_blocks: int, block_size: int, device: torch.device) -> None:
        self._blocks = blocks
        self._block_size = block_size
        self._bad = torch.zeros(num_blocks, dtype=torch.int32, device=device)

    def zero(self, block_ids: Sequence[int]) -> None:
        """Zeroes the blocks before their next request writes into them."""
        self._blocks.zero(block_ids)
        self._bad.index_fill_(0, self._index(block_ids), 0)

    def bad_rows(self, starts: np.ndarray, ends: np.ndarray, prompts: np.ndarray, block_ids: Sequence[Any]) -> Any:
        """Checks the blocks that a step has written. Returns bool [requests], on the device: True if not finite.

        Per request: tokens computed before the step (`starts`) and after it (`ends`), prompt length, and blocks. A
        request whose prompt is now complete answers for all its blocks, also for those that other requests have made.
        """
        size = self._block_size
        done = (starts < prompts) & (prompts <= ends)
        firsts, lasts = starts // size, np.where(done, -(-ends // size), ends // size)
        fresh: list[int] = []
        owners: list[int] = []
        owned: list[int] = []
        for row in np.flatnonzero(lasts > firsts).tolist():
            written = block_ids[row][firsts[row] : lasts[row]]
            fresh += written
            answered = block_ids[row][: lasts[row]] if done[row] else written
            owners += [row] * len(answered)
            owned += answered
        bad = torch.zeros(len(starts), dtype=torch.int32, device=self._bad.device)
        if fresh:
            self._bad.index_copy_(0, self._index(fresh), self._blocks.not_finite(fresh))
            bad.index_add_(0, self._index(owners), self._bad[self._index(owned)])
        return bad > 0

    def _index(self, numbers: Sequence[int]) -> torch.Tensor:
        return on_device(numbers, self._bad.device)


def bad_logits(logits: torch.Tensor) -> torch.Tensor:
    """Of raw logits [rows, vocabulary], bool [rows]: whether a row has a value that isn't finite, or equal values only.

    Logits are equal if a hidden state's square overflowed: RMSNorm (Zhang and Sennrich 2019, arXiv 1910.07467, eq. 4)
    divides by its root, which is infinity, and returns zeros.
    """
    low, high = logits.aminmax(dim=-1)
    return ~(low.isfinite() & high.isfinite()) | (low == high)


class FiniteRunner:
    """A mixin; put it before a V1 model runner class."""

    def initialize_kv_cache_tensors(self: Any, kv_cache_config: KVCacheConfig, *args: Any, **kwargs: Any) -> Any:
        caches: Mapping[str, torch.Tensor]
        caches = super().initialize_kv_cache_tensors(kv_cache_config, *args, **kwargs)  # type: ignore[misc]
        count = kv_cache_config.num_blocks
        size = self.vllm_config.cache_config.block_size
        self.block_numbers = BlockNumbers(KvBlocks(caches, count), count, size, self.device)
        return caches

    def _zero_block_ids(self: Any, block_ids: list[int]) -> None:
        self.block_numbers.zero(block_ids)

    def sample_tokens(self: Any, grammar_output: Any) -> Any:
        state = self.execute_model_state
        self._bad_rows = None
        if state is not None and state.logits is not None:
            batch, scheduled = self.input_batch, state.scheduler_output.num_scheduled_tokens
            requests, count = batch.req_ids, batch.num_reqs
            starts = batch.num_computed_tokens_cpu[:count]
            ends = starts + np.fromiter((scheduled[request] for request in requests), np.int64, count)
            blocks = [self.requests[request].block_ids[0] for request in requests]
            bad = self.block_numbers.bad_rows(starts, ends, batch.num_prompt_tokens[:count], blocks)
            self._bad_rows = bad | bad_logits(state.logits)
        return super().sample_tokens(grammar_output)  # type: ignore[misc]

    def _bookkeeping_sync(self: Any, scheduler_output: Any, sampler_output: Any, logits: Any, *args: Any) -> Any:
        """Passes vLLM one column with NaN for each bad row. vLLM uses the logits here only to count NaN."""
        marks = None if self._bad_rows is None else torch.where(self._bad_rows, torch.nan, 0.0).unsqueeze(1)
        return super()._bookkeeping_sync(scheduler_output, sampler_output, marks, *args)  # type: ignore[misc]


class ZeroedKvCacheConfig(KVCacheConfig):
    """Makes vLLM's scheduler report each block that it gives to a request, so that the runner zeroes the block."""

    needs_kv_cache_zeroing = True


class FiniteScheduler:
    """A mixin; put it before a scheduler class."""

    def __init__(self, vllm_config: Any, kv_cache_config: KVCacheConfig, *args: Any, **kwargs: Any) -> None:
        zeroed = ZeroedKvCacheConfig(
            **{field.name: getattr(kv_cache_config, field.name) for field in fields(kv_cache_config)}
        )
        super().__init__(vllm_config, zeroed, *args, **kwargs)  # type: ignore[call-arg]

    def update_from_output(
        self: Any, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        counts = model_runner_output.num_nans_in_logits or {}
        bad = [request for name, count in counts.items() if count and (request := self.requests.get(name))]
        for request in bad:
            for block_ids in self.kv_cache_manager.get_block_ids(request.request_id):
                self.kv_cache_manager.evict_blocks(set(block_ids))
        ended = self.finish_requests([request.request_id for request in bad], RequestStatus.FINISHED_ERROR)
        outputs: dict[int, EngineCoreOutputs]
        outputs = super().update_from_output(scheduler_output, model_runner_output)  # type: ignore[misc]
        for request in ended:
            output = EngineCoreOutput(
                request_id=request.request_id,
                new_token_ids=[],
                finish_reason=request.get_finished_reason(),
                stop_reason=NOT_FINITE,
                events=request.take_events(),
                trace_headers=request.trace_headers,
            )
            outputs.setdefault(request.client_index, EngineCoreOutputs()).outputs.append(output)
        return outputs
