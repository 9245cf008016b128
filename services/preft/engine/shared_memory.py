"""Shared memory and semaphores that an engine's processes make: unlinked however these processes end.

Python's resource tracker unlinks them when all processes that use it have ended. It is a child in their process group,
though, and whoever kills the group kills the tracker with it: files in /dev/shm stay. Ours is in a session of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from multiprocessing import resource_tracker
from typing import Any

_PROGRAM = """
import os, sys
if os.fork():
    os._exit(0)
os.setsid()
from multiprocessing.resource_tracker import main
main({fd})
"""


def start_tracker() -> None:
    """Gives this process and its spawned children a tracker that outlives them. Does nothing if they have one."""
    tracker: Any = resource_tracker._resource_tracker
    if tracker._fd is not None:
        return
    reader, writer = os.pipe()
    try:
        program = [sys.executable, "-I", "-S", "-c", _PROGRAM.format(fd=reader)]
        subprocess.run(program, pass_fds=[reader], stdin=subprocess.DEVNULL, check=True)
        tracker._fd = writer  # as multiprocessing.spawn does in a child
    finally:
        os.close(reader)
