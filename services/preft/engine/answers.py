"""The calls that a worker makes to its engine's processes through `collective_rpc`.

`lora` owns the adapters, and `transfer.connector` the KV.
"""

from __future__ import annotations

import os
from typing import Any

from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group

from preft.memory.arena import Region
from preft.transfer.connector import StagedKvConnector


class AnswersWorker:
    """A mixin; put it before a vLLM worker class."""

    def place_adapter(
        self: Any, lora_id: int, arena: str, offset: int, size: int, nonce: bytes, gone: list[int]
    ) -> bool:
        """Forgets the adapters `gone`, then see `GroupedWorkerLoRAManager.place_adapter`."""
        manager = self.model_runner.lora_manager
        manager.forget_adapters(gone)
        placed: bool = manager.place_adapter(lora_id, arena, Region(offset, size, nonce))
        return placed

    def between_steps(self) -> None:
        """Only answers: the engine's core makes such calls between two steps, or while it is idle."""

    def describe_kv(self: Any) -> dict[str, Any]:
        """`{"layout": text, "block_bytes": int, "pids": [int, int]}`, see `StagedKvConnector.describe`.

        An engine that transfers no KV returns "" and 0. `pids` are this process and its parent: the engine's core, or,
        if core and worker are one process, the process that started the engine.
        """
        kv = {"layout": "", "block_bytes": 0}
        if has_kv_transfer_group():
            connector = get_kv_transfer_group()
            assert isinstance(connector, StagedKvConnector)
            kv = connector.describe()
        return {**kv, "pids": [os.getppid(), os.getpid()]}
