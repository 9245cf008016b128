"""The `Engine` port over an unmodified vLLM AsyncLLM: arguments for its start, requests in, token deltas out.

`port` owns the interface; the modules that vLLM loads by name (worker, scheduler, connector) own the extensions.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import os
import signal
import threading
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from typing import Any

from vllm.config import KVTransferConfig, VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.exceptions import VLLMClientError
from vllm.lora.request import LoRARequest
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.utils.ompmultiprocessing import OMPProcessManager
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError
from vllm.v1.executor.uniproc_executor import UniProcExecutor
from vllm.v1.metrics.loggers import PrometheusStatLogger

from preft.adapters.formats.base_model import TARGETS
from preft.core.cluster import Role
from preft.core.errors import ConfigError, EngineFailed, InvalidAdapter, InvalidRequest, NumbersNotFinite, WorkerLost
from preft.core.request import (
    PARAMETERS,
    AdapterRef,
    FinishReason,
    PromptLogprobs,
    Sampling,
    TokenDelta,
    TokenLogprob,
)
from preft.core.settings import GiB, PrefillSettings, Settings
from preft.engine.bound import BoundToParent, forks_bound
from preft.engine.grammar import PARAM, STRUCTURED, UNFIT, FormChecks, form_of
from preft.engine.numbers import ENVIRONMENT, NOT_FINITE
from preft.engine.port import EngineInfo, EngineRequest, EngineStats, check_request
from preft.engine.prompt_logprobs import are_numbers, prompt_logprobs_of
from preft.engine.shared_memory import start_tracker
from preft.memory.arena import Region
from preft.transfer.connector import OUTPUT_SO_FAR

# Turns of a loop for which OpenMP's threads wait for work, where prefill and decode engines may share a CPU's cores. By
# default the threads spin for milliseconds, which delays the other engine's steps. Without spinning, the threads would
# sleep between the many short operations of a decode step or of a prompt's adapters. A colocated engine keeps the
# default: with this value it had 0.7 to 0.9 of the tokens/s (64 streams on two cores).
SPIN = "5000"
CODE_VERSION = 6
"""Part of vLLM's compile-cache key, which ignores our worker class. Raise it when traced code changes."""


def engine_args(settings: Settings, role: Role, arena: str) -> AsyncEngineArgs:
    """vLLM's arguments for one engine of `role`. Decode has no adapters, and colocated no KV transfer."""
    own = settings.engine(role)
    on_cpu = current_platform.is_cpu()
    args: dict[str, Any] = {
        "model": str(settings.model),
        "skip_tokenizer_init": True,
        "dtype": settings.dtype or ("float32" if on_cpu else "auto"),
        "seed": settings.seed,
        "block_size": settings.block_size or (32 if on_cpu else 16),
        "max_num_seqs": own.max_num_seqs,
        "max_num_batched_tokens": own.max_num_batched_tokens,
        "enable_prefix_caching": own.enable_prefix_caching,
        "enforce_eager": own.enforce_eager if own.enforce_eager is not None else on_cpu,
        "gpu_memory_utilization": own.gpu_memory_utilization,
        "kv_cache_memory_bytes": own.kv_cache_bytes or (GiB if on_cpu else None),
        "disable_hybrid_kv_cache_manager": True,
        "generation_config": "vllm",
        "disable_log_stats": True,
        # vLLM's CPU default puts the model in a second process, and each process waits for the other in a busy loop.
        "distributed_executor_backend": UniProcExecutor if on_cpu else None,
        "worker_cls": "preft.engine.cpu_worker.PreftCPUWorker" if on_cpu else "preft.engine.gpu_worker.PreftGPUWorker",
        "additional_config": {"preft": CODE_VERSION, "role": role.value, "process": BoundToParent("bound")},
    }
    scheduler = "PromptAdapterScheduler" if role is Role.COLOCATED else "PreftScheduler"
    args["scheduler_cls"] = f"preft.engine.scheduler.{'' if on_cpu else 'Async'}{scheduler}"
    args["async_scheduling"] = not on_cpu
    if role is not Role.COLOCATED:
        args["kv_transfer_config"] = KVTransferConfig(
            kv_connector="StagedKvConnector",
            kv_connector_module_path="preft.transfer.connector",
            kv_role="kv_producer" if role is Role.PREFILL else "kv_consumer",
            kv_load_failure_policy="fail",
            kv_connector_extra_config={"arena": arena},
        )
    if settings.max_model_len is not None:
        args["max_model_len"] = settings.max_model_len
    if isinstance(own, PrefillSettings):
        args |= {
            "enable_lora": True,
            "max_loras": own.max_loras,
            "max_cpu_loras": own.max_loras,  # further adapters wait in our own host memory
            "max_lora_rank": own.max_lora_rank,
            "lora_target_modules": list(TARGETS),  # no slots in layers that no adapter may change
        }
    return AsyncEngineArgs(**args)


def check_one_device(args: AsyncEngineArgs) -> None:
    """Raises ConfigError for an engine of several ranks.

    All ranks would write their parts of the KV to the same place and seal it, and the wrong KV would go unnoticed.
    """
    for name in (
        "tensor_parallel_size",
        "pipeline_parallel_size",
        "data_parallel_size",
        "prefill_context_parallel_size",
        "decode_context_parallel_size",
    ):
        if getattr(args, name) != 1:
            raise ConfigError(f"{name}: {getattr(args, name)} isn't supported yet: each engine uses one device")


def sampling_params(request: EngineRequest, role: Role) -> SamplingParams:
    """vLLM's sampling parameters for one choice. EOS tokens become stop tokens, as the engine has no tokenizer."""
    sampling = request.sampling
    stop = sampling.stop_token_ids if sampling.ignore_eos else (*sampling.stop_token_ids, *sampling.eos_token_ids)
    region = request.save or request.load
    extra: dict[str, Any] = {}
    if region is not None:
        extra["kv_transfer_params"] = dataclasses.asdict(region)
    if request.output_token_ids:
        extra[OUTPUT_SO_FAR] = list(request.output_token_ids)
    if sampling.structured_outputs is not None:
        ends = (*sampling.stop_token_ids, *sampling.eos_token_ids)
        extra[STRUCTURED] = form_of(sampling.structured_outputs, ends)
    ours = ("eos_token_ids", "structured_outputs")
    params = {name: getattr(sampling, name) for name in PARAMETERS if name not in ours}
    params |= {"ignore_eos": True, "stop_token_ids": list(stop), "logit_bias": dict(sampling.logit_bias) or None}
    params["allowed_token_ids"] = list(sampling.allowed_token_ids) or None
    if role is Role.PREFILL:
        params |= {"max_tokens": 1, "min_tokens": min(sampling.min_tokens, 1)}
    if role is Role.DECODE or request.index or request.output_token_ids:
        params["prompt_logprobs"] = None  # they come once, with the first token of choice 0
    return SamplingParams(
        **params,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        flat_logprobs=params["prompt_logprobs"] is not None,  # not a dictionary for each token of the prompt
        extra_args=extra or None,
    )


class _Stats(PrometheusStatLogger):
    """Copies vLLM's figures after each step into our `EngineStats`, the class attribute of a subclass.

    It stands in for vLLM's own Prometheus metrics, which nobody reads: they take time in every step, and two engines
    that start in one process at once fail over them.
    """

    stats: EngineStats

    def __init__(self, vllm_config: VllmConfig, engine_indexes: list[int] | None = None) -> None:
        pass

    def record(
        self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0, **_: Any
    ) -> None:
        if scheduler_stats is not None:
            self.stats.kv_usage = scheduler_stats.kv_cache_usage
            self.stats.running = scheduler_stats.num_running_reqs
            self.stats.waiting = scheduler_stats.num_waiting_reqs
        if iteration_stats is not None:
            self.stats.preemptions += iteration_stats.num_preempted_reqs

    def record_sleep_state(self, *_: Any) -> None:
        pass

    def record_admission_rejection(self, reason: str) -> None:
        pass

    def log_engine_initialized(self) -> None:
        pass


class VllmEngine:
    """One AsyncLLM with its engine process. `start` creates it, and `close` ends it."""

    def __init__(self, llm: AsyncLLM, role: Role, info: EngineInfo, stats: EngineStats, adapter_arena: str) -> None:
        self._llm = llm
        self._role = role
        self.info = info
        self.stats = stats
        self._lora_ids: dict[str, int] = {}  # digest -> vLLM's integer id, unique for each load
        self._gone: list[int] = []  # ids that the engine forgets with the next `place_adapter`
        self._next_lora_id = itertools.count(1)
        self._forms = FormChecks(llm.model_config.model, info.vocab_size)
        self._counts_from_end: dict[str, bool] = {}  # digest -> whether its ReFT acts on the last positions
        self._adapter_arena = adapter_arena
        self._killed: str | None = None  # why `kill` was called

    @classmethod
    async def start(
        cls, settings: Settings, role: Role, arena: str, adapter_arena: str = "", **overrides: Any
    ) -> VllmEngine:
        """Starts the engine process and waits until it can serve (25-45 s on CPU).

        `arena` holds KV, and `adapter_arena` adapters. `overrides` are vLLM arguments. Raises ConfigError if the engine
        would use more than one device.
        """
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"  # V2 is the default where Triton is installed; our runner is V1
        os.environ.update(ENVIRONMENT)
        if current_platform.is_cpu() and role is not Role.COLOCATED:
            os.environ.setdefault("GOMP_SPINCOUNT", SPIN)
        start_tracker()
        stats = EngineStats()
        args = dataclasses.replace(engine_args(settings, role, arena), **overrides)
        check_one_device(args)
        llm = await asyncio.to_thread(_start, args, stats)
        config = llm.vllm_config
        described = (await llm.collective_rpc("describe_kv"))[0]
        info = EngineInfo(
            kv_layout=described["layout"],
            block_size=config.cache_config.block_size,
            block_bytes=described["block_bytes"],
            kv_blocks=config.cache_config.num_gpu_blocks - 1,  # vLLM reserves one as the null block
            max_model_len=config.model_config.max_model_len,
            vocab_size=config.model_config.get_vocab_size(),
            pids=tuple(pid for pid in described["pids"] if pid != os.getpid()),
        )
        return cls(llm, role, info, stats, adapter_arena)

    async def place_adapter(self, adapter: AdapterRef, region: Region) -> None:
        lora_id = self._lora_request(adapter).lora_int_id
        gone, self._gone = self._gone, []
        place = (lora_id, self._adapter_arena, region.offset, region.size, region.nonce, gone)
        try:
            answers = await self._llm.collective_rpc("place_adapter", args=place)
            self._counts_from_end[adapter.digest] = answers[0]
        except EngineDeadError as error:
            raise WorkerLost(f"the engine died: {error}") from error
        except Exception as error:
            self.forget_adapter(adapter.digest)
            raise InvalidAdapter(f"adapter {adapter.name!r} was refused by the engine: {error}") from error

    def forget_adapter(self, digest: str) -> None:
        self._counts_from_end.pop(digest, None)
        if (lora_id := self._lora_ids.pop(digest, None)) is not None:
            self._gone.append(lora_id)

    async def between_steps(self) -> None:
        try:
            await self._llm.collective_rpc("between_steps")  # reaches the engine after all aborts
        except EngineDeadError as error:
            raise WorkerLost(f"the engine died: {error}") from error

    def _prompt_salt(self, request: EngineRequest) -> str:
        """The prompt's length if the adapter's ReFT acts on last positions, else "". Such a ReFT makes a prefix's KV
        depend on the prompt's length.
        """
        if request.adapter is None:
            return ""
        return str(len(request.prompt_token_ids)) if self._counts_from_end[request.adapter.digest] else ""

    def _lora_request(self, adapter: AdapterRef) -> LoRARequest:
        if adapter.digest not in self._lora_ids:
            self._lora_ids[adapter.digest] = next(self._next_lora_id)
        return LoRARequest(
            lora_name=adapter.digest, lora_int_id=self._lora_ids[adapter.digest], lora_path=adapter.digest
        )

    async def generate(self, request: EngineRequest) -> AsyncGenerator[TokenDelta, None]:
        check_request(request, self.info)
        prompt: dict[str, Any] = {"prompt_token_ids": [*request.prompt_token_ids, *request.output_token_ids]}
        if salt := ":".join(filter(None, [request.salt, self._prompt_salt(request)])):
            prompt["cache_salt"] = salt
        lora = self._lora_request(request.adapter) if request.adapter is not None else None
        eos = tuple(token for token in request.sampling.eos_token_ids if token < self.info.vocab_size)
        request = dataclasses.replace(request, sampling=dataclasses.replace(request.sampling, eos_token_ids=eos))
        if request.sampling.structured_outputs is not None and not request.output_token_ids:
            await self._forms.check(request.sampling.structured_outputs)
        try:
            params = sampling_params(request, self._role)
            async with aclosing(self._llm.generate(prompt, params, request.request_id, lora_request=lora)) as outputs:
                tells_cached = request.index == 0 and not request.output_token_ids
                async for output in outputs:
                    choice = output.outputs[0]
                    if choice.stop_reason == NOT_FINITE:
                        raise NumbersNotFinite(_not_finite(request))
                    if isinstance(choice.stop_reason, str) and choice.stop_reason.startswith(UNFIT):
                        raise InvalidRequest(choice.stop_reason.removeprefix(UNFIT), param=PARAM)
                    if choice.finish_reason in ("error", "abort"):
                        raise EngineFailed("the engine gave the request up")
                    delta = _delta(request, choice, output.num_cached_tokens or 0 if tells_cached else 0)
                    if output.prompt_logprobs:
                        delta = dataclasses.replace(delta, prompt_logprobs=_prompt_logprobs(request, output))
                    yield delta
                    tells_cached = False
        except EngineDeadError as error:
            raise WorkerLost(f"the engine died: {error}") from error
        except EngineGenerateError as error:
            raise EngineFailed(f"the engine gave the request up: {error.__cause__ or error}") from error
        except VLLMClientError as error:
            raise InvalidRequest(f"the engine refuses the request: {error}") from error

    def kill(self, reason: str) -> None:
        self._killed = reason
        for pid in self.info.pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    async def wait_dead(self) -> str:
        while self._killed is None and not self._llm.errored:
            await asyncio.sleep(0.2)
        return self._killed or str(self._llm.dead_error)

    async def close(self) -> None:
        self.kill("it is closed")  # its processes hold nothing that is needed, and would take seconds to end
        await asyncio.to_thread(self._forms.close)
        await asyncio.to_thread(self._llm.shutdown)


def _prompt_logprobs(request: EngineRequest, output: Any) -> PromptLogprobs:
    """Raises NumbersNotFinite."""
    assert request.sampling.prompt_logprobs is not None
    logprobs = prompt_logprobs_of(output.prompt_logprobs, request.sampling.prompt_logprobs)
    if not are_numbers(logprobs):
        raise NumbersNotFinite(_not_finite(request))
    return logprobs


def _not_finite(request: EngineRequest) -> str:
    if request.adapter is None:
        return "the model computed NaN or infinity in this request"
    return (
        f"adapter {request.adapter.name!r} made the model compute NaN or infinity: its weights or its scaling are too "
        f"large for this model and prompt"
    )


def _start(args: AsyncEngineArgs, stats: EngineStats) -> AsyncLLM:
    config = args.create_engine_config()
    if current_platform.is_cpu():
        os.environ.update(_thread_settings(config))
    own = type("_OwnStats", (_Stats,), {"stats": stats})
    with forks_bound():
        return AsyncLLM.from_vllm_config(config, stat_loggers=[own], disable_log_stats=True)


_settings_are_read = threading.Lock()  # vLLM changes the environment and restores it


def _thread_settings(config: VllmConfig) -> dict[str, str]:
    """Number and cores of OpenMP's threads, as vLLM sets them for a process that only runs the model.

    Ray sets one thread for a worker.
    """
    with _settings_are_read, OMPProcessManager(config).configure_omp_envs(rank=0, local_rank=0):
        return {name: value for name, value in os.environ.items() if name.startswith(("OMP_", "GOMP_CPU_", "KMP_"))}


def _delta(request: EngineRequest, choice: Any, cached_tokens: int) -> TokenDelta:
    sampling: Sampling = request.sampling
    stopped_by = choice.stop_reason if isinstance(choice.stop_reason, int) else None
    logprobs: tuple[TokenLogprob, ...] = ()
    if sampling.logprobs is not None and choice.logprobs:
        logprobs = tuple(
            _token_logprob(token, entry, sampling.logprobs)
            for token, entry in zip(choice.token_ids, choice.logprobs, strict=True)
        )
    return TokenDelta(
        index=request.index,
        token_ids=tuple(choice.token_ids),
        logprobs=logprobs,
        finish_reason=FinishReason(choice.finish_reason) if choice.finish_reason else None,
        stop_token_id=stopped_by if stopped_by in sampling.stop_token_ids else None,
        cached_tokens=cached_tokens,
    )


def _token_logprob(token: int, entry: Any, count: int) -> TokenLogprob:
    ranked = sorted(((value.rank, key, value.logprob) for key, value in entry.items()), key=lambda item: item[0])
    return TokenLogprob(
        token_id=token,
        logprob=entry[token].logprob,
        rank=entry[token].rank,
        top=tuple((key, logprob) for rank, key, logprob in ranked if rank <= count)[:count],
    )
