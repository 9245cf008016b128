"""Shared memory doesn't stay in /dev/shm when the whole process group that made it is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from preft.engine import shared_memory

SERVICES = Path(shared_memory.__file__).parents[2]
PROGRAM = """
import multiprocessing, sys, time
from multiprocessing.shared_memory import SharedMemory
from preft.engine.shared_memory import start_tracker

def child():
    made = SharedMemory(create=True, size=64)
    print(made.name, flush=True)
    time.sleep(60)

if __name__ == "__main__":
    start_tracker()
    start_tracker()  # there is one
    multiprocessing.get_context("spawn").Process(target=child).start()
    made = SharedMemory(create=True, size=64)
    print(made.name, flush=True)
    time.sleep(60)
"""


def test_files_of_a_killed_process_group_go(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    command = [sys.executable, str(program)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={"PYTHONPATH": str(SERVICES)}, start_new_session=True
    ) as process:
        assert process.stdout is not None
        files = [Path("/dev/shm", process.stdout.readline().strip()) for _ in range(2)]
        assert all(file.is_file() for file in files)
        os.killpg(process.pid, signal.SIGKILL)
    end = time.monotonic() + 20
    while any(file.exists() for file in files) and time.monotonic() < end:
        time.sleep(0.02)
    assert not any(file.exists() for file in files)
