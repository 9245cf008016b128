"""Starting and ending a server, with small scripts in its place."""

from __future__ import annotations

import os
import sys
import textwrap
import time
from pathlib import Path

import pytest

from preft_loadgen import served as module
from preft_loadgen.served import ServeFailed, marked_processes, served

GOOD = """
import signal, sys
signal.signal(signal.SIGINT, lambda *_: sys.exit(0))
print("PreFT Serve starts on http://127.0.0.1:1")
print("PreFT Serve is ready on http://127.0.0.1:4321 after 3 s")
print(" ".join(sys.argv[1:]))
signal.pause()
"""
LEAVES_A_CHILD = "import subprocess, sys\nsubprocess.Popen(['sleep', '300'], start_new_session=True)\n" + GOOD
FAILS = "print('the engine has no memory'); raise SystemExit(3)"
HANGS = "import time; print('loading'); time.sleep(300)"
DIES_LATER = "print('PreFT Serve is ready on http://x:1 after 0 s', flush=True); raise SystemExit(9)"


def run(tmp_path: Path, script: str, **options: float):
    path = tmp_path / "serve.py"
    path.write_text(textwrap.dedent(script))
    command = (sys.executable, str(path))
    return served(["--model", "m"], state_dir=tmp_path / "state", log=tmp_path / "log", command=command, **options)


def test_ready_and_gone(tmp_path: Path) -> None:
    with run(tmp_path, GOOD) as server:
        assert server.url == "http://127.0.0.1:4321"
        log = tmp_path / "log"
        end = time.monotonic() + 5
        while "--port 0" not in log.read_text() and time.monotonic() < end:
            time.sleep(0.05)
        assert log.read_text().splitlines()[2] == f"--model m --port 0 --state-dir {tmp_path / 'state'}"
        (pid,) = children()
    assert not Path(f"/proc/{pid}").exists()


def children() -> list[int]:
    """Pids of the servers among this process's children."""
    pids = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    return [int(pid) for pid in pids if b"serve.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def test_what_it_leaves_behind_is_told_and_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STOP_SECONDS", 2.0)
    server = run(tmp_path, LEAVES_A_CHILD)
    with pytest.raises(ServeFailed, match="left 1 processes running"), server:  # noqa: PT012
        (mark,) = {
            entry.decode()
            for pid in children()
            for entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            if entry.startswith(b"PREFT_SERVED_BY=")
        }
        assert len(marked_processes(mark)) == 2
    assert marked_processes(mark) == []


def test_a_server_that_fails_shows_its_log(tmp_path: Path) -> None:
    with pytest.raises(ServeFailed, match=r"status 3:\nthe engine has no memory"), run(tmp_path, FAILS):
        pytest.fail("it isn't ready")


def test_a_server_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STOP_SECONDS", 2.0)
    with pytest.raises(ServeFailed, match=r"didn't get ready in time:\nloading"), run(tmp_path, HANGS, ready_seconds=1):
        pytest.fail("it isn't ready")
    assert children() == []


def test_a_server_that_dies_meanwhile(tmp_path: Path) -> None:
    with pytest.raises(ServeFailed, match="had ended with status 9"), run(tmp_path, DIES_LATER):
        time.sleep(0.5)


def test_an_error_inside_ends_the_server_and_goes_on(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), run(tmp_path, GOOD):
        1 / 0  # noqa: B018
    assert children() == []
