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

    Linux takes the end of the thread that starts the process for the parent's end: start it from one that stays.
    """
    return [sys.executable, "-I", os.path.abspath(__file__), str(os.getpid()), *command]


def main() -> None:
    """Becomes the command in the arguments. The signal stays set across `exec`."""
    _, parent, *command = sys.argv
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(parent):  # it died before
        sys.exit(1)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
