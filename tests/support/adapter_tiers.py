"""An AdapterStore over its own folder, as in a worker."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from preft.adapters.disk_tier import DiskTier
from preft.adapters.source_limits import SourceLimits
from preft.adapters.store import AdapterEngine, AdapterStore
from preft.core.settings import MiB
from preft.transfer.staging import StagingArena


@asynccontextmanager
async def adapter_store(
    engine: AdapterEngine,
    memory: StagingArena,
    *,
    slots: int = 4,
    disk_bytes: int = 64 * MiB,
    source_timeout: float = 5.0,
) -> AsyncIterator[AdapterStore]:
    """Closes the store at the end. The caller keeps `engine` and `memory`."""
    with tempfile.TemporaryDirectory() as folder:
        disk = DiskTier(Path(folder) / "adapters", disk_bytes, disk_bytes)
        store = AdapterStore("w", disk, memory, engine, slots, SourceLimits(source_timeout))
        try:
            yield store
        finally:
            await store.close()
