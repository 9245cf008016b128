"""Starting and ending a server, with small scripts in its place."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from preft_loadgen import served as module
from preft_loadgen.served import ServeFailed, marked_processes, served

GOOD = """
import signal, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
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


OWNER = """
import signal, sys
from pathlib import Path
from preft_loadgen.served import served
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup would have it ignored
folder = Path(sys.argv[1])
with served(["x"], state_dir=folder / "s", log=folder / "log", command=(sys.executable, str(folder / "serve.py"))):
    print("serves", flush=True)
    sys.stdin.read()
"""
SLOW_TO_END = """
import os, pathlib, signal, sys, time
def leave(*_):
    time.sleep(1)
    pathlib.Path(sys.argv[0]).with_name("ended").touch()
    sys.exit(0)
signal.signal(signal.SIGTERM, leave)
pathlib.Path(sys.argv[0]).with_name("pid").write_text(str(os.getpid()))
print("PreFT Serve is ready on http://x:1 after 0 s", flush=True)
signal.pause()
"""


@pytest.mark.parametrize("when", ["loads", "serves"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL])
def test_a_server_ends_with_its_owner(tmp_path: Path, number: int, when: str) -> None:
    """`timeout 60 make demo` sends more than one signal: timeout to its process group, make to its children."""
    ready = SLOW_TO_END if when == "serves" else SLOW_TO_END.replace("is ready", "starts")
    (tmp_path / "serve.py").write_text(ready)
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout is not None
    try:
        if when == "serves":
            assert owner.stdout.readline() == "serves\n"
        wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text() != "")
        for _ in range(30):
            owner.send_signal(number)
            time.sleep(0.0005)
        wait_for((tmp_path / "ended").exists)
        assert owner.wait(10) != 0
        pid = (tmp_path / "pid").read_text()
        wait_for(lambda: not Path("/proc", pid).exists())
    finally:
        owner.kill()
        owner.communicate()


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "took too long"
        time.sleep(0.02)
