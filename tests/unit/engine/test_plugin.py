"""An engine process never outlives the worker that started it, however that ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from preft.engine import plugin
from support.processes import alive

SERVICES = Path(plugin.__file__).parents[2]
PROGRAM = """
import multiprocessing, os, threading, time
from preft.engine.plugin import _watch_parent

def child():
    _watch_parent()
    _watch_parent()
    watching = [thread for thread in threading.enumerate() if thread.name == "preft-parent-watch"]
    print(os.getpid(), len(watching), flush=True)
    time.sleep(60)

if __name__ == "__main__":
    _watch_parent()  # nobody's child: nothing to watch
    assert threading.active_count() == 1
    multiprocessing.get_context("spawn").Process(target=child).start()
    time.sleep(60)
"""


@pytest.fixture
def parent(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    environment = {**os.environ, "PYTHONPATH": str(SERVICES)}
    with subprocess.Popen([sys.executable, program], stdout=subprocess.PIPE, text=True, env=environment) as process:
        yield process
        process.kill()


def test_the_child_ends_with_its_parent(parent: subprocess.Popen[str]) -> None:
    assert parent.stdout is not None
    pid, watching = map(int, parent.stdout.readline().split())
    try:
        assert watching == 1
        assert alive(pid)
        parent.send_signal(signal.SIGKILL)
        end = time.monotonic() + 10
        while alive(pid) and time.monotonic() < end:
            time.sleep(0.02)
        assert not alive(pid)
    finally:
        if alive(pid):
            os.kill(pid, signal.SIGKILL)
