"""The cluster's state behind one interface: registered workers and the adapter catalog's entries."""

from __future__ import annotations

import time
from pathlib import Path

from preft.core.errors import ConfigError
from preft.core.ports import StateStore
from preft.state.sqlite import SqliteStore

__all__ = ["GONE_SECONDS", "open_store", "remove_gone_workers"]

GONE_SECONDS = 3600.0  # a worker that is silent for so long is gone, even if it was loading its engine
SILENT_SECONDS = 10.0  # for a worker whose process is not running


def open_store(url: str | Path) -> StateStore:
    """The store at `url`: a file path, or `sqlite:///absolute/path`. Creates a missing file.

    Raises ConfigError if the scheme is unknown or the file can't be used. Blocks for some milliseconds. The first
    process to open the file blocks until 10 MiB are on the disk.
    """
    text = str(url)
    scheme, separator, rest = text.partition("://")
    if not separator:
        return SqliteStore(Path(text))
    if scheme == "sqlite" and rest.startswith("/"):
        return SqliteStore(Path(rest))
    raise ConfigError(f"state store {text!r}: give a file path or sqlite:///absolute/path")


async def remove_gone_workers(store: StateStore) -> None:
    """Removes killed workers from the store. A removed worker that lives registers again.

    A worker counts as killed if its process is gone, or after GONE_SECONDS of silence. Raises Unavailable if the store
    can't be used.
    """
    for worker in await store.workers():
        silent = time.time() - worker.heartbeat
        if silent > GONE_SECONDS or (silent > SILENT_SECONDS and not _is_running(worker.pid)):
            await store.remove_worker(worker.id)


def _is_running(pid: int) -> bool:
    return Path("/proc", str(pid)).exists()
