"""The cluster's memory behind one interface: which workers exist and which adapters the catalog names."""

from __future__ import annotations

import time
from pathlib import Path

from preft.core.errors import ConfigError
from preft.core.ports import StateStore
from preft.state.sqlite import SqliteStore

__all__ = ["GONE_SECONDS", "open_store", "remove_gone_workers"]

GONE_SECONDS = 3600.0  # a worker that was silent for so long is gone, even if it was loading its engine
SILENT_SECONDS = 10.0  # of a worker whose process is not there


def open_store(url: str | Path) -> StateStore:
    """The store at `url`: a file path, or `sqlite:///absolute/path`. Creates the file if there is none.

    Raises ConfigError if the scheme is unknown or the file can't be used. Blocks for some milliseconds; the first to
    open it, until 10 MiB are on the disk.
    """
    text = str(url)
    scheme, separator, rest = text.partition("://")
    if not separator:
        return SqliteStore(Path(text))
    if scheme == "sqlite" and rest.startswith("/"):
        return SqliteStore(Path(rest))
    raise ConfigError(f"state store {text!r}: give a file path or sqlite:///absolute/path")


async def remove_gone_workers(store: StateStore) -> None:
    """Forgets the workers that were killed and couldn't do it themselves. One that lives registers again.

    A worker was killed if its process is gone, or if it was silent for GONE_SECONDS.

    Raises Unavailable if the store can't be used.
    """
    for worker in await store.workers():
        silent = time.time() - worker.heartbeat
        if silent > GONE_SECONDS or (silent > SILENT_SECONDS and not _is_running(worker.pid)):
            await store.remove_worker(worker.id)


def _is_running(pid: int) -> bool:
    return Path("/proc", str(pid)).exists()
