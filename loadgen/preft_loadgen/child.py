"""Child processes that end with their parent, however the parent ends. Linux only."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Sequence

PR_SET_PDEATHSIG = 1


def bound(command: Sequence[str]) -> list[str]:
    """`command`, run by this module in a process that gets SIGTERM when its parent dies.

    Linux watches the thread that starts the process, so a long-lived thread must start it.
    """
    return [sys.executable, "-I", os.path.abspath(__file__), str(os.getpid()), *command]


def main() -> None:
    """Replaces this process by the command in the arguments. `exec` keeps the signal setting."""
    _, parent, *command = sys.argv
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(parent):  # the parent has died already
        sys.exit(1)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
