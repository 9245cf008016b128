"""vLLM's GPU worker with our model runner. Named to vLLM by `worker_cls`."""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.gpu_worker import Worker

from preft.core.cluster import Role
from preft.engine.describe import DescribesKv
from preft.engine.runner import HandoverRunner


class HandoverGPUModelRunner(HandoverRunner, GPUModelRunner):
    """vLLM's V1 GPU runner that takes over requests."""


class PreftGPUWorker(DescribesKv, Worker):
    """Leaves the V2 runner as it is: it takes over requests by itself. But it applies adapters to output too."""

    def _make_model_runner(self) -> Any:
        if self.use_v2_model_runner:
            if self.vllm_config.additional_config["role"] == Role.COLOCATED.value:
                raise RuntimeError("a colocated engine needs vLLM's V1 model runner: unset VLLM_USE_V2_MODEL_RUNNER")
            return super()._make_model_runner()
        return HandoverGPUModelRunner(self.vllm_config, self.device)
