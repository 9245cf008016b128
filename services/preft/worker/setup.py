"""What a worker gets from outside: its settings, and what the cluster makes of them on this machine."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass

from preft.adapters.store.adapter_store import AdapterStore
from preft.core.cluster import Role
from preft.core.settings import Settings
from preft.engine.port import Engine
from preft.memory.arena import StagingArena
from preft.rpc.secret import ClusterSecret

OpenAdapters = Callable[[str, StagingArena, Engine, int], AbstractAsyncContextManager[AdapterStore]]
"""Opens the adapter store of a worker, given its id, the memory for adapters, its engine and the number of slots."""


@dataclass(frozen=True, slots=True)
class WorkerSetup:
    """One worker's set-up. `model` identifies the base model: workers of equal models may work together."""

    settings: Settings
    role: Role
    secret: ClusterSecret
    model: str
    staging_bytes: int
    open_adapters: OpenAdapters
