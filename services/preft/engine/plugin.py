"""Prepares every vLLM process; vLLM calls `register` through its `general_plugins` entry point.

`register` requests permission to use AMX tiles: without it bfloat16 attention on CPU dies with SIGILL. `register` also
watches the parent process, because an engine process otherwise outlives a worker that was killed.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import threading


def register() -> None:
    """Entry point; vLLM may call it several times per process."""
    _permit_amx()
    _watch_parent()


def _permit_amx() -> None:
    import torch

    if torch.cpu._is_amx_tile_supported():
        torch.cpu._init_amx()


def _watch_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is None or any(thread.name == "preft-parent-watch" for thread in threading.enumerate()):
        return
    sentinel = parent.sentinel

    def wait() -> None:
        multiprocessing.connection.wait([sentinel])
        os._exit(1)

    threading.Thread(target=wait, name="preft-parent-watch", daemon=True).start()
