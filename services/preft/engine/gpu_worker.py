"""vLLM's GPU worker with our model runner. `worker_cls` names this class to vLLM."""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.gpu_worker import Worker

from preft.engine.answers import AnswersWorker
from preft.engine.runner import HandoverRunner


class HandoverGPUModelRunner(HandoverRunner, GPUModelRunner):
    """vLLM's V1 GPU runner with HandoverRunner's additions."""


class PreftGPUWorker(AnswersWorker, Worker):
    """Refuses vLLM's V2 runner: there adapters would act on output too, and ReFT not at all."""

    def _make_model_runner(self) -> Any:
        if self.use_v2_model_runner:
            raise RuntimeError("our model runner extends vLLM's V1 runner: unset VLLM_USE_V2_MODEL_RUNNER")
        return HandoverGPUModelRunner(self.vllm_config, self.device)
