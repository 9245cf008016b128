"""What we rely on in vLLM, by name: an upgrade that changes one of these fails here, not in a request.

Nothing is started. What the scheduler does with the connector is tested with the real one in `test_connector`.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
import re
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.logprobs import FlatLogprobs, append_logprobs_for_next_position, create_prompt_logprobs
from vllm.lora.layers.base import BaseLayerWithLoRA
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.layers.logits_processor import LogitsProcessorWithLoRA
from vllm.lora.model_manager import (
    DEFAULT_LANGUAGE_WRAPPER_KEY,
    AdapterLRUCache,
    LoRAModelManager,
    LRUCacheLoRAModelManager,
)
from vllm.lora.punica_wrapper.punica_base import PunicaWrapperBase
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
from vllm.model_executor import models
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.plugins import DEFAULT_PLUGINS_GROUP
from vllm.sampling_params import SamplingParams
from vllm.v1.core import kv_cache_utils
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core import EngineCoreProc
from vllm.v1.executor.abstract import Executor
from vllm.v1.executor.multiproc_executor import MultiprocExecutor
from vllm.v1.executor.uniproc_executor import UniProcExecutor
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.metrics.loggers import PrometheusStatLogger, StatLoggerBase, StatLoggerManager
from vllm.v1.metrics.stats import IterationStats, SchedulerStats
from vllm.v1.outputs import KVConnectorOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu_input_batch import InputBatch
from vllm.v1.worker.gpu_model_runner import AsyncGPUModelRunnerOutput, ExecuteModelState, GPUModelRunner
from vllm.v1.worker.gpu_worker import Worker
from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

from bench.plain_engine import plain_args
from preft.core.cluster import Role
from preft.core.request import PARAMETERS
from preft.core.settings import load_settings
from preft.engine import plugin
from preft.engine.cpu_worker import HandoverCPUModelRunner, PreftCPUWorker
from preft.engine.gpu_worker import HandoverGPUModelRunner, PreftGPUWorker
from preft.engine.grammar import GrammarScheduler
from preft.engine.head import HeadLayer
from preft.engine.lora import GroupedLoRAModelManager, GroupedPunicaWrapper, GroupedWorkerLoRAManager
from preft.engine.reft import DECODER_LAYERS, ReftLayer
from preft.engine.runner import HandoverRunner, PromptRows
from preft.engine.scheduler import AsyncPromptAdapterScheduler, PromptAdapterScheduler
from preft.engine.vllm_engine import _Stats, _thread_settings, engine_args
from preft.transfer.connector import StagedKvConnector
from support.models import make_model


def parameters(function: Callable[..., Any]) -> list[str]:
    """Names, without `self` and those that collect whatever else there is."""
    collecting = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    given = inspect.signature(function).parameters.values()
    return [one.name for one in given if one.kind not in collecting and one.name != "self"]


def in_order(function: Callable[..., Any], *pieces: str) -> bool:
    """Whether the function's source holds these pieces, one after the other."""
    source, position = inspect.getsource(function), 0
    for piece in pieces:
        position = source.find(piece, position) + 1
        if not position:
            return False
    return True


def overridden(ours: type, theirs: type) -> list[str]:
    """Public methods that `ours` defines and `theirs` has."""
    return [name for name, value in vars(ours).items() if inspect.isfunction(value) and hasattr(theirs, name)]


# The model runner


def test_the_runner_s_hook_comes_when_rows_stand_and_before_metadata_is_made() -> None:
    assert parameters(GPUModelRunner._may_reorder_batch) == ["scheduler_output"]
    assert in_order(
        GPUModelRunner._update_states,
        "self.input_batch.add_request(",
        "self.input_batch.condense()",
        "self._may_reorder_batch(scheduler_output)",
        "self.input_batch.refresh_metadata()",
    )
    assert inspect.getsource(GPUModelRunner._update_states).count("self._may_reorder_batch(") == 1


@pytest.mark.parametrize(
    ("ours", "theirs"), [(HandoverCPUModelRunner, CPUModelRunner), (HandoverGPUModelRunner, GPUModelRunner)]
)
def test_our_runner_s_methods_are_the_ones_called(ours: type, theirs: type) -> None:
    for name in ("_may_reorder_batch", "set_active_loras", "load_lora_model"):
        assert hasattr(theirs, name)
        assert getattr(ours, name) is getattr(HandoverRunner, name)


def test_the_scheduler_says_how_many_tokens_are_output() -> None:
    """What the runner compares its own count with after each step."""
    assert "num_output_tokens" in inspect.getsource(Scheduler._make_cached_request_data)


def test_the_batch_refers_to_the_generators_and_outputs_that_we_change() -> None:
    assert "generators=self.generators" in inspect.getsource(InputBatch._make_sampling_metadata)
    assert in_order(InputBatch.add_request, "self.req_output_token_ids", "request.output_token_ids")


def test_generators_are_still_wound_back_after_chunks() -> None:
    """If this fails, `_spare_generators` may no longer be needed."""
    assert "gen.set_offset(gen.get_offset() - 4)" in inspect.getsource(GPUModelRunner._bookkeeping_sync)


def test_lora_models_are_made_where_we_make_ours() -> None:
    assert parameters(LoRAModelRunnerMixin.load_lora_model) == ["model", "vllm_config", "device"]
    assert "self.load_lora_model(self.model, self.vllm_config, self.device)" in inspect.getsource(
        CPUModelRunner.load_model
    )
    assert in_order(LoRAModelRunnerMixin.load_lora_model, "self.lora_manager =", "create_lora_manager(")
    assert in_order(LoRAModelRunnerMixin.load_lora_model, "LRUCacheWorkerLoRAManager(", "model.embedding_modules")


def test_logits_are_made_where_the_output_layer_s_lora_acts() -> None:
    """On the rows of `LoRAMapping.prompt_mapping`, before they are capped and scaled."""
    assert in_order(LogitsProcessor.forward, "self._get_logits(", "self.soft_cap", "self.scale")
    assert parameters(LogitsProcessor._get_logits)[:2] == ["hidden_states", "lm_head"]
    assert "type(self.base_layer).forward(self, " in inspect.getsource(LogitsProcessorWithLoRA.forward)
    assert "_get_logits" in overridden(HeadLayer, LogitsProcessorWithLoRA)
    for model in ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3"):
        source = (Path(models.__path__[0]) / f"{model}.py").read_text()
        assert "self.logits_processor(" in source or "ForCausalLM(LlamaForCausalLM" in source


# Workers


def test_workers_make_their_runners_where_we_make_ours() -> None:
    assert issubclass(PreftCPUWorker, CPUWorker)
    assert issubclass(PreftGPUWorker, Worker)
    assert "self.model_runner: GPUModelRunner = self._make_model_runner()" in inspect.getsource(
        Worker._init_workspace_and_model_runner
    )
    assert "GPUModelRunnerV1(self.vllm_config, self.device)" in inspect.getsource(Worker._make_model_runner)
    assert "self.use_v2_model_runner = " in inspect.getsource(Worker.__init__)
    # The CPU worker names the class directly. Once it asks `_make_model_runner`, ours needn't build two.
    assert "CPUModelRunner(self.vllm_config, " in inspect.getsource(CPUWorker.init_device)


def test_the_executor_that_cpu_engines_get_is_one(tmp_path: Path) -> None:
    """Its name, "uni", would be replaced by vLLM's platform for CPU."""
    settings = load_settings(None, {"model": str(make_model(tmp_path / "model"))})
    config = engine_args(settings, Role.DECODE, arena="").create_engine_config()
    assert Executor.get_class(config) is UniProcExecutor
    assert int(_thread_settings(config)["OMP_NUM_THREADS"]) >= 1
    plain = plain_args(settings, lora=False).create_engine_config()
    assert Executor.get_class(plain) is MultiprocExecutor


def test_a_step_s_inputs_wait_until_the_last_one_s_are_copied() -> None:
    """Ours too: token groups are written to pinned memory in `set_active_loras`."""
    assert in_order(GPUModelRunner.execute_model, "self.synchronize_input_prep()", "self._prepare_inputs(")
    assert "self.set_active_loras(" in inspect.getsource(GPUModelRunner._prepare_inputs)


def test_the_second_runner_is_refused() -> None:
    """It would apply adapters to output too."""
    worker = object.__new__(PreftGPUWorker)
    worker.use_v2_model_runner = True
    with pytest.raises(RuntimeError, match="unset VLLM_USE_V2_MODEL_RUNNER"):
        worker._make_model_runner()


# LoRA


def test_our_lora_classes_are_used() -> None:
    assert GroupedWorkerLoRAManager._manager_cls is GroupedLoRAModelManager
    assert "lora_manager_cls=self._manager_cls" in inspect.getsource(LRUCacheWorkerLoRAManager.create_lora_manager)
    assert issubclass(GroupedLoRAModelManager, LRUCacheLoRAModelManager)
    assert parameters(LoRAModelManager._init_punica_wrapper) == ["max_num_batched_tokens", "vllm_config"]
    assert parameters(GroupedLoRAModelManager._init_punica_wrapper) == ["max_num_batched_tokens", "vllm_config"]
    assert in_order(LoRAModelManager.__init__, "self._init_punica_wrapper(", "self._create_lora_modules()")
    assert "self.punica_wrapper_mapping[DEFAULT_LANGUAGE_WRAPPER_KEY]" in inspect.getsource(
        LoRAModelManager._init_punica_wrapper
    )
    assert isinstance(DEFAULT_LANGUAGE_WRAPPER_KEY, str)


def test_our_wrapper_has_all_that_layers_call() -> None:
    assert GroupedPunicaWrapper.__abstractmethods__ == frozenset()
    for name in ("update_metadata", "add_lora_linear"):
        theirs, ours = getattr(PunicaWrapperBase, name), getattr(GroupedPunicaWrapper, name)
        assert parameters(ours) == parameters(theirs), name
    assert parameters(PunicaWrapperBase._update_base_metadata) == parameters(PunicaWrapperBase.update_metadata)
    theirs, ours = parameters(PunicaWrapperBase.__init__), parameters(GroupedPunicaWrapper.__init__)
    assert ours == [*theirs, "slots", "rank"]


def test_the_runner_places_tokens_after_slots_are_given() -> None:
    assert parameters(LoRAModelRunnerMixin.set_active_loras)[:2] == ["input_batch", "num_scheduled_tokens"]
    assert HandoverCPUModelRunner.set_active_loras is HandoverRunner.set_active_loras
    assert in_order(GPUModelRunner._prepare_inputs, "num_computed_tokens_cpu[req_indices]", "self.set_active_loras(")
    for name in ("num_computed_tokens_cpu", "num_prompt_tokens"):
        assert f"self.{name}" in inspect.getsource(InputBatch.__init__)
    assert parameters(InputBatch.make_lora_inputs) == parameters(PromptRows.make_lora_inputs)
    assert "input_batch.make_lora_inputs(num_scheduled_tokens, num_sampled_tokens)" in inspect.getsource(
        LoRAModelRunnerMixin.set_active_loras
    )


def test_adapters_come_in_where_vllm_would_load_them() -> None:
    assert parameters(LRUCacheWorkerLoRAManager.add_adapter) == ["lora_request"]
    assert "self.add_adapter(lora)" in inspect.getsource(LRUCacheWorkerLoRAManager._apply_adapters)
    assert in_order(
        LRUCacheWorkerLoRAManager.add_adapter,
        "not in self.list_adapters()",
        "len(self._adapter_manager) + 1 > self._adapter_manager.capacity",
        "self._adapter_manager.remove_oldest_adapter()",
        "self._adapter_manager.add_adapter(lora)",
        "self._adapter_manager.activate_adapter(lora_request.lora_int_id)",
    )
    assert in_order(LRUCacheLoRAModelManager.add_adapter, "not in self._registered_adapters", "self._add_adapter(lora)")
    assert in_order(
        LoRAModelManager.activate_adapter,
        "self._active_adapters[lora_id] = None",
        "self.lora_index_to_id[index] = lora_model.id",
        "in self.modules.items()",
        "module.set_lora(",
    )
    assert "self.deactivate_fn(key)" in inspect.getsource(AdapterLRUCache._on_remove)  # leaving one is leaving both
    assert "packed_modules[module_full_name] = [" in inspect.getsource(LoRAModelManager._register_packed_modules)


def test_slots_start_as_zeros_and_have_the_shapes_we_write() -> None:
    source = inspect.getsource(BaseLinearLayerWithLoRA.create_lora_weights)
    assert source.count("torch.zeros(") == 2
    assert in_order(
        BaseLinearLayerWithLoRA.set_lora, "self.lora_a_stacked[0][index, 0,", "self.lora_b_stacked[0][index, 0,"
    )
    assert parameters(BaseLayerWithLoRA.set_lora) == parameters(ReftLayer.set_lora)
    assert parameters(BaseLayerWithLoRA.reset_lora) == parameters(ReftLayer.reset_lora)


@pytest.mark.parametrize(
    ("module", "layer"),
    [
        ("llama", "LlamaDecoderLayer"),
        ("mistral", "MistralDecoderLayer"),
        ("qwen2", "Qwen2DecoderLayer"),
        ("qwen3", "Qwen3DecoderLayer"),
        ("gemma2", "Gemma2DecoderLayer"),
        ("gemma3", "Gemma3DecoderLayer"),
    ],
)
def test_decoder_layers_hand_on_the_residual_stream_in_two_parts(module: str, layer: str) -> None:
    assert layer in DECODER_LAYERS
    found = getattr(importlib.import_module(f"vllm.model_executor.models.{module}"), layer)
    assert "return hidden_states, residual" in inspect.getsource(found.forward)
    assert "self.input_layernorm = " in "".join(inspect.getsource(kind.__init__) for kind in found.__mro__[:2])


# The scheduler of a colocated engine


@pytest.mark.parametrize(
    ("ours", "theirs"), [(PromptAdapterScheduler, Scheduler), (AsyncPromptAdapterScheduler, AsyncScheduler)]
)
def test_a_request_may_bring_a_grammar_of_ours(ours: type[Scheduler], theirs: type[Scheduler]) -> None:
    assert issubclass(ours, GrammarScheduler)
    request = inspect.getsource(Request)
    assert "return self.structured_output_request is not None" in request
    assert "self.status = RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR" in request
    waiting = inspect.getsource(Scheduler._handle_blocked_waiting_request)
    assert "self.grammar_compile_error_reqs.add(request.request_id)" in waiting
    failed = inspect.getsource(theirs.update_from_output)
    assert "error_req_ids = set(self.grammar_compile_error_reqs)" in failed
    assert "self.structured_output_manager.accept_tokens(" in failed
    masks = inspect.getsource(StructuredOutputManager)
    assert "self.backend.allocate_token_bitmask(" in masks
    assert "if apply_bitmask and not grammar.is_terminated():" in masks
    assert "if reasoner is None:\n            return _CONSTRAINED_FROM_START" in masks


@pytest.mark.parametrize(
    ("ours", "theirs"), [(PromptAdapterScheduler, Scheduler), (AsyncPromptAdapterScheduler, AsyncScheduler)]
)
def test_our_scheduler_is_theirs_but_for_adapters(ours: type[Scheduler], theirs: type[Scheduler]) -> None:
    assert issubclass(ours, theirs)
    for name in ("add_request", "_update_after_schedule", "_preempt_request", "_free_request"):
        assert getattr(ours, name) is not getattr(theirs, name)
        assert parameters(getattr(theirs, name))[: len(parameters(getattr(ours, name)))] == parameters(
            getattr(ours, name)
        )


def test_slots_are_counted_by_what_running_requests_name() -> None:
    assert in_order(
        Scheduler.schedule,
        "req.lora_request.lora_int_id",
        "for req in scheduled_running_reqs",
        "if req.lora_request and req.lora_request.lora_int_id > 0",
        "NewRequestData.from_request(",
        "self._update_after_schedule(scheduler_output)",
    )
    assert "request.num_computed_tokens += num_scheduled_token" in inspect.getsource(Scheduler._update_after_schedule)


def test_block_hashes_name_the_adapter() -> None:
    assert 'return [("lora", lora_request.lora_name, lora_request.lora_path)]' in inspect.getsource(
        kv_cache_utils._gen_lora_extra_hash_keys
    )
    assert "self._block_hasher(self)" in inspect.getsource(Request.update_block_hashes)
    assert "self.update_block_hashes()" in inspect.getsource(Request.append_output_token_ids)


# The KV connector


@pytest.mark.parametrize("name", overridden(StagedKvConnector, KVConnectorBase_V1))
def test_connector_methods_take_what_they_are_given(name: str) -> None:
    theirs, ours = getattr(KVConnectorBase_V1, name), getattr(StagedKvConnector, name)
    assert parameters(ours) == parameters(theirs)


def test_the_connector_has_all_that_is_called() -> None:
    assert StagedKvConnector.__abstractmethods__ == frozenset()
    assert {
        "on_new_request", "get_num_new_matched_tokens", "update_state_after_alloc", "build_connector_meta",
        "update_connector_output", "request_finished", "register_kv_caches", "start_load_kv", "wait_for_save",
        "get_block_ids_with_load_errors",
    } <= set(overridden(StagedKvConnector, KVConnectorBase_V1))  # fmt: skip


def test_when_the_scheduler_calls_the_connector() -> None:
    assert in_order(Scheduler.add_request, "self.requests[request.request_id] = request", "connector.on_new_request(")
    assert in_order(
        Scheduler.schedule,
        "self.connector.get_num_new_matched_tokens(",
        "self.connector.update_state_after_alloc(",
        "self._build_kv_connector_meta(self.connector, scheduler_output)",
        "self._update_after_schedule(scheduler_output)",  # until then num_computed_tokens is that before the step
    )
    assert in_order(Scheduler.update_from_output, "self._handle_invalid_blocks(", "self._update_from_kv_xfer_finished(")
    assert "self.connector.update_connector_output(" in inspect.getsource(Scheduler._update_from_kv_xfer_finished)
    assert "bind_kv_cache_manager(self.kv_cache_manager)" in inspect.getsource(Scheduler.__init__)
    assert "self._kv_cache_manager = " in inspect.getsource(KVConnectorBase_V1.bind_kv_cache_manager)
    assert parameters(KVCacheManager.evict_blocks) == ["block_ids"]
    assert parameters(KVCacheManager.get_block_ids) == ["request_id"]


def test_fields_that_the_connector_reads_and_writes() -> None:
    request = Request("r", [1, 2, 3], SamplingParams(extra_args={"kv_transfer_params": {"a": 1}}), None)
    assert request.kv_transfer_params == {"a": 1}
    assert (request.prompt_token_ids, request._all_token_ids, request.num_prompt_tokens) == ([1, 2, 3], [1, 2, 3], 3)
    assert request.prompt_token_ids is not request._all_token_ids  # so that cutting the one leaves the other
    assert request.prefill_stats is not None
    request._output_token_ids.extend([2, 3])
    assert list(request.output_token_ids) == [2, 3]
    assert request.num_output_tokens == 2
    assert {"invalid_block_ids"} <= {field.name for field in dataclasses.fields(KVConnectorOutput)}
    assert {"kv_connector_metadata", "num_scheduled_tokens"} <= {
        field.name for field in dataclasses.fields(SchedulerOutput)
    }
    assert hasattr(AttentionLayerBase, "get_attn_backend")


def test_failed_loads_can_be_made_to_fail_requests() -> None:
    config = KVTransferConfig(
        kv_connector="StagedKvConnector",
        kv_connector_module_path="preft.transfer.connector",
        kv_role="kv_consumer",
        kv_load_failure_policy="fail",
    )
    assert (config.is_kv_consumer, config.is_kv_producer) == (True, False)
    assert 'kv_load_failure_policy == "recompute"' in inspect.getsource(Scheduler.__init__)


# Numbers that aren't finite


def test_the_runner_zeroes_what_the_scheduler_names() -> None:
    """Before a KV load of the same step, which comes with the forward pass."""
    assert in_order(GPUModelRunner._update_states, "new_block_ids_to_zero", "self._zero_block_ids(")
    assert in_order(GPUModelRunner.execute_model, "self._update_states(", "self.maybe_get_kv_connector_output(")
    assert "kv_cache_config.needs_kv_cache_zeroing" in inspect.getsource(Scheduler.__init__)
    assert isinstance(KVCacheConfig.needs_kv_cache_zeroing, property)


def test_rows_that_were_marked_are_counted() -> None:
    """On GPU the count follows on the device. Nothing else is read from the logits there."""
    assert {"scheduler_output", "logits"} <= set(ExecuteModelState._fields)
    assert in_order(GPUModelRunner.sample_tokens, "self.execute_model_state", "self._bookkeeping_sync(")
    assert parameters(GPUModelRunner._bookkeeping_sync)[:3] == ["scheduler_output", "sampler_output", "logits"]
    uses = re.findall(r"\blogits\b", inspect.getsource(GPUModelRunner._bookkeeping_sync))
    assert len(uses) == 4  # the parameter, and three for the count
    assert in_order(
        GPUModelRunner._bookkeeping_sync,
        "envs.VLLM_COMPUTE_NANS_IN_LOGITS",
        "count_nans_per_row(logits)",
        "self._get_nans_in_logits(logits)",
    )
    assert "count_nans_per_row(logits)" in inspect.getsource(GPUModelRunner._get_nans_in_logits)
    assert "output.num_nans_in_logits = " in inspect.getsource(AsyncGPUModelRunnerOutput.get_output)


# The engine


def test_the_engine_s_own_interface() -> None:
    assert {"prompt", "sampling_params", "request_id", "lora_request"} <= set(parameters(AsyncLLM.generate))
    assert parameters(AsyncLLM.add_lora) == ["lora_request"]
    assert set(PARAMETERS) - {"eos_token_ids"} <= set(parameters(SamplingParams))
    for name in ("collective_rpc", "errored", "dead_error", "shutdown", "from_vllm_config"):
        assert hasattr(AsyncLLM, name)
    assert {"skip_tokenizer_init", "worker_cls", "additional_config", "kv_transfer_config"} <= {
        field.name for field in dataclasses.fields(AsyncEngineArgs)
    }


def test_calls_are_answered_between_steps_alone() -> None:
    """By the thread that makes the steps: an engine that hangs in a step doesn't answer. Idle engines answer too."""
    assert in_order(
        EngineCoreProc,  # the loop itself is decorated, and hides its source
        "def run_busy_loop(self)",
        "self._process_input_queue()",
        "self._process_engine_step()",
        "def _process_input_queue(self)",
    )
    assert in_order(
        EngineCoreProc._process_input_queue,
        "while not self.has_work()",
        "self._handle_client_request(",
        "while not self.input_queue.empty()",
        "self._handle_client_request(",
    )
    assert "EngineCoreRequestType.UTILITY" in inspect.getsource(EngineCoreProc._handle_client_request)
    assert "self.input_queue.put_nowait((request_type, request))" in inspect.getsource(
        EngineCoreProc.process_input_sockets
    )


def test_our_statistics_stand_in_for_vllms_prometheus_metrics() -> None:
    """vLLM makes no metrics of its own beside ours, and calls only our methods: vLLM's need a state that ours lack."""
    assert issubclass(_Stats, PrometheusStatLogger)
    assert "if not custom_prometheus_logger:" in inspect.getsource(StatLoggerManager.__init__)
    called = {name for name, _ in inspect.getmembers(PrometheusStatLogger, inspect.isfunction)} & {
        name for name, _ in inspect.getmembers(StatLoggerManager, inspect.isfunction)
    }
    stateful = {name for name in called if name in vars(PrometheusStatLogger)}
    assert stateful <= set(vars(_Stats)), stateful - set(vars(_Stats))


def test_what_we_read_after_each_step() -> None:
    assert set(parameters(_Stats.record)) >= set(parameters(StatLoggerBase.record))
    assert {"kv_cache_usage", "num_running_reqs", "num_waiting_reqs"} <= {
        field.name for field in dataclasses.fields(SchedulerStats)
    }
    stats = IterationStats()
    assert stats.num_preempted_reqs == 0


def test_our_plugin_is_called_in_every_process() -> None:
    assert DEFAULT_PLUGINS_GROUP == "vllm.general_plugins"
    (entry,) = entry_points(group=DEFAULT_PLUGINS_GROUP, name="preft")
    assert entry.load() is plugin.register


def test_prompt_logprobs() -> None:
    """One method computes them, after the step's adapters were set; the request reads no prefix cache."""
    method = GPUModelRunner._get_prompt_logprobs_dict
    assert parameters(method) == ["hidden_states", "num_scheduled_tokens"]
    source = inspect.getsource(method)
    for name in (
        "self.num_prompt_logprobs", "request.in_progress_prompt_logprobs_cpu", "request.num_computed_tokens",
        "self.query_start_loc.np[req_idx]", "LogprobsTensors.empty_cpu", "self.model.compute_logits(",
        "self.sampler.compute_logprobs(logits)", "self.sampler.gather_logprobs(", "self._sync_device()",
        "if num_tokens <= num_remaining_tokens",
    ):  # fmt: skip
        assert name in source
    assert "self._get_prompt_logprobs_dict(" in inspect.getsource(GPUModelRunner._bookkeeping_sync)
    assert inspect.getsource(GPUModelRunner).count("self._get_prompt_logprobs_dict(") == 1
    scored = SamplingParams(prompt_logprobs=0, flat_logprobs=True)
    assert (scored.skip_reading_prefix_cache, SamplingParams().skip_reading_prefix_cache) == (True, False)
    flat = create_prompt_logprobs(flat_logprobs=True)
    append_logprobs_for_next_position(flat, [5, 7], [-2.0, -1.0], [None, None], 4, 1)
    assert isinstance(flat, FlatLogprobs)
    assert (flat.token_ids, flat.logprobs, flat.ranks, len(flat)) == ([5, 7], [-2.0, -1.0], [4, 1], 2)
