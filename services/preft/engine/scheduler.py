"""vLLM's schedulers with our rules. In a colocated engine a request has its adapter only until its prompt is computed.

Extension points used: `scheduler_cls`; `Scheduler.add_request`, `_update_after_schedule`, `_preempt_request` and
`_free_request`; `Request.lora_request` and `_block_hasher`. After its prompt, a request takes no adapter slot. Blocks
with output are hashed as output of the base model after a prompt of that length under that adapter. No prompt has the
same hash, so the next turn of a chat computes these tokens again, with the adapter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm.v1.core.kv_cache_utils import BlockHash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from preft.engine.grammar import GrammarScheduler
from preft.engine.numbers import FiniteScheduler
from preft.transfer.connector import split_output


@dataclass(frozen=True, slots=True)
class _AfterPrompt:
    """Replaces the LoRARequest while output blocks are hashed: vLLM puts its name and path into the hash."""

    lora_name: str
    lora_path: str


class _PromptAdapters:
    """A mixin; put it before a scheduler class of vLLM."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._adapters: dict[str, Any] = {}  # request id -> its LoRARequest, also after its prompt

    def add_request(self: Any, request: Request) -> None:
        split_output(request)
        if request.lora_request is not None:
            self._adapters[request.request_id] = request.lora_request
            self._hash_output_apart(request)
        super().add_request(request)  # type: ignore[misc]

    def _hash_output_apart(self: Any, request: Request) -> None:
        inner, adapter, prompt = request._block_hasher, request.lora_request, request.num_prompt_tokens
        if inner is None or adapter is None:
            return
        after = _AfterPrompt(f"{adapter.lora_name}:{prompt}", adapter.lora_path)

        def hasher(request: Request) -> list[BlockHash]:
            kept, request.lora_request = request.lora_request, after
            try:
                hashes: list[BlockHash] = inner(request)
                return hashes
            finally:
                request.lora_request = kept

        request._block_hasher = hasher
        del request.block_hashes[prompt // self.hash_block_size :]  # the request's output was hashed as prompt
        request.update_block_hashes()

    def _update_after_schedule(self: Any, scheduler_output: SchedulerOutput) -> None:
        super()._update_after_schedule(scheduler_output)  # type: ignore[misc]
        for request_id in scheduler_output.num_scheduled_tokens:
            request = self.requests[request_id]
            if request.num_computed_tokens >= request.num_prompt_tokens:
                request.lora_request = None

    def _preempt_request(self: Any, request: Request, *args: Any, **kwargs: Any) -> None:
        super()._preempt_request(request, *args, **kwargs)  # type: ignore[misc]
        request.lora_request = self._adapters.get(request.request_id)  # its prompt will be computed again

    def _free_request(self: Any, request: Request, *args: Any, **kwargs: Any) -> Any:
        self._adapters.pop(request.request_id, None)
        return super()._free_request(request, *args, **kwargs)  # type: ignore[misc]


class PreftScheduler(FiniteScheduler, GrammarScheduler, Scheduler):
    """For a prefill or decode engine whose steps don't overlap (CPU)."""


class AsyncPreftScheduler(FiniteScheduler, GrammarScheduler, AsyncScheduler):
    """For a prefill or decode engine that schedules the next step while one runs."""


class PromptAdapterScheduler(_PromptAdapters, FiniteScheduler, GrammarScheduler, Scheduler):
    """For a colocated engine whose steps don't overlap."""


class AsyncPromptAdapterScheduler(_PromptAdapters, FiniteScheduler, GrammarScheduler, AsyncScheduler):
    """For a colocated engine that schedules the next step while one runs."""
