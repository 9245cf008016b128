"""What a role's services are made of, and what they leave to the worker's server. `server` makes the parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import grpc.aio

from preft.adapters.store.adapter_store import AdapterStore
from preft.engine.port import Engine
from preft.memory.arena import StagingArena
from preft.rpc.secret import ClusterSecret
from preft.transfer.handles import HandleTable
from preft.transfer.port import KvSender
from preft.worker.usage import Usage


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts of one worker. `adapters` is None on a decode worker; `transfer_timeout` is in seconds."""

    engine: Engine
    arena: StagingArena
    adapters: AdapterStore | None
    sender: KvSender
    usage: Usage
    fingerprint: str
    secret: ClusterSecret
    transfer_timeout: float


@dataclass(frozen=True, slots=True)
class Served:
    """The full names of the services that a role has added, and its KV handles, which the caller closes."""

    names: tuple[str, ...]
    handles: HandleTable | None = None


AddServices = Callable[[grpc.aio.Server, Parts], Served]
"""Adds the services of one role to a server that hasn't started."""
