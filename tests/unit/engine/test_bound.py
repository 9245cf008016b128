"""An engine's process ends with its worker before vLLM has run any of our code in it."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from preft.engine import bound
from preft.engine.bound import BoundToParent
from support.processes import alive

SERVICES = Path(bound.__file__).parents[2]
PROGRAM = """
import multiprocessing, os, sys, threading, time
from preft.engine.bound import BoundToParent, forks_bound

def child(*arguments):
    print(os.getpid(), flush=True)
    time.sleep(60)

def start(method, *arguments):
    with forks_bound():
        multiprocessing.get_context(method).Process(target=child, args=arguments, daemon=True).start()
    time.sleep(60)

if __name__ == "__main__":
    thread = threading.Thread(target=start, args=(sys.argv[1], BoundToParent("x")))
    thread.start()
    thread.join()
"""


@contextmanager
def parent(folder: Path, method: str) -> Iterator[subprocess.Popen[str]]:
    program = folder / "program.py"
    program.write_text(PROGRAM)
    with subprocess.Popen(
        [sys.executable, program, method],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(SERVICES)},
    ) as process:
        yield process
        process.kill()


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_the_child_ends_with_its_parent(tmp_path: Path, method: str) -> None:
    with parent(tmp_path, method) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        try:
            assert alive(pid)
            process.send_signal(signal.SIGKILL)
            end = time.monotonic() + 10
            while alive(pid) and time.monotonic() < end:
                time.sleep(0.02)
            assert not alive(pid)
        finally:
            if alive(pid):
                os.kill(pid, signal.SIGKILL)


def test_a_copy_binds_no_process() -> None:
    """vLLM copies its configuration within a process, whose parent may end."""
    assert copy.deepcopy([BoundToParent("x")]) == ["x"]
    assert isinstance(copy.deepcopy(BoundToParent("x")), BoundToParent)
