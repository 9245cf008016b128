"""A worker's process under Ray ends with its main thread, whatever its other threads do."""

from __future__ import annotations

import subprocess
import sys
import time

PROGRAM = """
import time
from concurrent.futures import ThreadPoolExecutor
from preft.cluster.worker_actor import end_with_main_thread
if {guarded}:
    end_with_main_thread()
ThreadPoolExecutor().submit(time.sleep, 5)
print("ends", flush=True)
"""


def seconds_to_end(*, guarded: bool) -> tuple[float, int]:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(guarded=guarded)], stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ends\n"
        began = time.monotonic()
        status = process.wait(60)
        return time.monotonic() - began, status


def test_the_process_does_not_wait_for_its_threads() -> None:
    seconds, status = seconds_to_end(guarded=True)
    assert seconds < 4
    assert status == 1
    assert seconds_to_end(guarded=False)[0] > 4  # Python's own way
