"""What a worker gets from outside: its settings, and what the cluster makes of them on this machine."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import NamedTuple

from preft.adapters.sources.peers import Peers
from preft.adapters.store.adapter_store import AdapterStore
from preft.adapters.store.disk_tier import DiskTier
from preft.core.cluster import Role
from preft.core.ports import StateStore
from preft.core.settings import Settings
from preft.engine.port import Engine
from preft.memory.arena import StagingArena
from preft.rpc.secret import ClusterSecret


class OpenedAdapters(NamedTuple):
    """A worker's adapters. `peers` is None if no other process can have content that this machine lacks."""

    disk: DiskTier
    store: AdapterStore
    peers: Peers | None


OpenAdapters = Callable[[StateStore, str, StagingArena, Engine, int], AbstractAsyncContextManager[OpenedAdapters]]
"""Opens a worker's adapters, given the store of registrations, its id, memory for adapters, engine and slots."""


@dataclass(frozen=True, slots=True)
class WorkerSetup:
    """One worker's set-up. `model` identifies the base model: workers of equal models may work together."""

    settings: Settings
    role: Role
    secret: ClusterSecret
    model: str
    staging_bytes: int
    open_adapters: OpenAdapters
