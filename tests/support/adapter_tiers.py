"""An AdapterStore over its own folder, as in a worker."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from preft.adapters.sources.limits import SourceLimits
from preft.adapters.sources.peers import Peers
from preft.adapters.store.adapter_store import AdapterEngine, AdapterStore
from preft.adapters.store.disk_tier import DiskTier
from preft.core.settings import MiB
from preft.memory.arena import StagingArena


@asynccontextmanager
async def adapter_store(
    engine: AdapterEngine,
    memory: StagingArena,
    *,
    slots: int = 4,
    disk_bytes: int = 64 * MiB,
    source_timeout: float = 5.0,
    peers: Peers | None = None,
) -> AsyncIterator[AdapterStore]:
    """Closes the store at the end. The caller keeps `engine` and `memory`."""
    with tempfile.TemporaryDirectory() as folder:
        disk = DiskTier(Path(folder) / "adapters", disk_bytes, disk_bytes)
        store = AdapterStore(disk, memory, engine, slots, SourceLimits(source_timeout), peers=peers)
        try:
            yield store
        finally:
            await store.close()
