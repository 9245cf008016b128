"""Multi-LoRA on all tokens with our kernels, for comparisons: vLLM's own server, scheduler and adapter caches run it.

`vllm serve MODEL --enable-lora --worker-cls bench.all_tokens.AllTokenCPUWorker` (or `AllTokenGPUWorker`). vLLM's CPU
kernels for LoRA are slow for reasons of their own. Against this server, prefill-only adapters show what they save.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.gpu_worker import Worker

from preft.engine.lora import GroupedLoRAModelManager


class AllTokenLoRAModelManager(GroupedLoRAModelManager):
    """Our kernels and slots, filled from vLLM's cache of adapters, which may have more adapters than slots."""

    def activate_adapter(self, lora_id: int) -> bool:
        is_new = super().activate_adapter(lora_id)
        if is_new:
            rank = max(part.rank for part in self._registered_adapters.cache[lora_id].loras.values())
            self._punica.hold(self.lora_index_to_id.index(lora_id), rank, None)
        return is_new


class AllTokenWorkerLoRAManager(LRUCacheWorkerLoRAManager):
    """vLLM's loading of PEFT folders, into our slots."""

    _manager_cls = AllTokenLoRAModelManager


class AllTokenRunner:
    """A mixin before a V1 model runner class."""

    def load_lora_model(
        self: Any, model: torch.nn.Module, vllm_config: VllmConfig, device: torch.device
    ) -> torch.nn.Module:
        self.lora_manager = AllTokenWorkerLoRAManager(vllm_config, device, model.embedding_modules)
        wrapped: torch.nn.Module = self.lora_manager.create_lora_manager(model, vllm_config)
        return wrapped


class AllTokenCPUModelRunner(AllTokenRunner, CPUModelRunner):
    """vLLM's V1 CPU runner with our kernels."""


class AllTokenGPUModelRunner(AllTokenRunner, GPUModelRunner):
    """vLLM's V1 GPU runner with our kernels."""


class AllTokenCPUWorker(CPUWorker):
    """Builds its runner twice, because vLLM's own `init_device` names the stock runner class."""

    def init_device(self) -> Any:
        super().init_device()
        self.model_runner = AllTokenCPUModelRunner(self.vllm_config, self.device)


class AllTokenGPUWorker(Worker):
    """vLLM's GPU worker with our kernels."""

    def _make_model_runner(self) -> Any:
        return AllTokenGPUModelRunner(self.vllm_config, self.device)
