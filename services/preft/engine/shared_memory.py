"""Unlinks the shared memory and semaphores of an engine's processes, however these processes end.

Python's resource tracker does so when all processes that use it have ended. But the tracker is a child in their process
group, so a kill of the group kills the tracker too, and files stay in /dev/shm. Our tracker has its own session.
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
    """Starts a tracker that outlives this process and its spawned children. Does nothing if there is one already."""
    tracker: Any = resource_tracker._resource_tracker
    if tracker._fd is not None:
        return
    reader, writer = os.pipe()
    try:
        program = [sys.executable, "-I", "-S", "-c", _PROGRAM.format(fd=reader)]
        subprocess.run(program, pass_fds=[reader], stdin=subprocess.DEVNULL, check=True)
        tracker._fd = writer  # multiprocessing.spawn does the same in a child
    finally:
        os.close(reader)
