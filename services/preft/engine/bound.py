"""Ends an engine's process when its worker dies, from the process's first moment on. Linux only.

vLLM forks the process, or spawns a new interpreter (in a Ray actor, or with CUDA in use). A forked process is bound by
a hook, and a spawned process when it reads its arguments. Later, `plugin` watches the parent in every vLLM process.
"""

from __future__ import annotations

import ctypes
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)
_binding = threading.local()


@contextmanager
def forks_bound() -> Iterator[None]:
    """Binds the processes that this thread forks within the context. The thread must live as long as they do."""
    _binding.parent = os.getpid()
    try:
        yield
    finally:
        del _binding.parent


class BoundToParent(str):
    """A text that binds a spawned process: it is among the process's arguments, and acts when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickled, (str(self), os.getpid())


def _unpickled(text: str, pid: int) -> BoundToParent:
    if os.getpid() != pid:  # else a copy in the same process
        _bind(pid)
    return BoundToParent(text)


def _forked() -> None:
    if (parent := getattr(_binding, "parent", None)) is not None:
        _bind(parent)


def _bind(parent: int) -> None:
    """Lets the kernel kill this process when `parent`'s thread that started it ends."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # the parent has died already
        os._exit(1)


os.register_at_fork(after_in_child=_forked)
