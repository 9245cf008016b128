"""vLLM's CPU worker with our model runner. Named to vLLM by `worker_cls`."""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker

from preft.engine.answers import AnswersWorker
from preft.engine.runner import HandoverRunner


class HandoverCPUModelRunner(HandoverRunner, CPUModelRunner):
    """vLLM's V1 CPU runner that takes over requests."""


class PreftCPUWorker(AnswersWorker, CPUWorker):
    """Builds its runner twice: vLLM's own `init_device` names the stock runner class directly."""

    def init_device(self) -> Any:
        super().init_device()
        self.model_runner = HandoverCPUModelRunner(self.vllm_config, self.device)
