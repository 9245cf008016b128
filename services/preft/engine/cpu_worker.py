"""vLLM's CPU worker with our model runner. `worker_cls` names this class to vLLM."""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker

from preft.engine.answers import AnswersWorker
from preft.engine.runner import HandoverRunner


class HandoverCPUModelRunner(HandoverRunner, CPUModelRunner):
    """vLLM's V1 CPU runner with HandoverRunner's additions."""


class PreftCPUWorker(AnswersWorker, CPUWorker):
    """Builds its runner twice, because vLLM's own `init_device` names the stock runner class."""

    def init_device(self) -> Any:
        super().init_device()
        self.model_runner = HandoverCPUModelRunner(self.vllm_config, self.device)
