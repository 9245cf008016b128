"""A `preft serve` subprocess that ends with its owner, however the owner ends, and whose end is verified.

Linux only.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preft_loadgen.child import bound
from preft_loadgen.errors import LoadgenError

READY = re.compile(r"PreFT Serve is ready on (http://\S+)")
STOP_SECONDS = 60.0
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
TAIL_LINES = 40


class ServeFailed(LoadgenError):
    """The server didn't start, died, or left processes running. The message ends with the end of its log."""


@dataclass(frozen=True, slots=True)
class Served:
    """A server that is ready. `start_seconds` is the duration of its start."""

    url: str
    pid: int
    state_dir: Path
    start_seconds: float

    def workers(self) -> list[dict[str, Any]]:
        """The workers as `preft status --json` lists them. Raises ServeFailed."""
        command = [sys.executable, "-m", "preft.cli", "status", "--json", "--url", self.url]
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
        if ran.returncode != 0:
            raise ServeFailed(f"preft status failed: {ran.stderr.strip()}")
        workers: list[dict[str, Any]] = json.loads(ran.stdout)["workers"]
        return workers


@contextmanager
def served(
    arguments: Sequence[str],
    *,
    state_dir: Path,
    log: Path,
    ready_seconds: float = 300.0,
    command: Sequence[str] = (),
) -> Iterator[Served]:
    """Runs `preft serve` with `arguments` on a free port. The end of the context sends SIGTERM.

    The output goes to the file `log`. All processes of the server, Ray's included, inherit a mark in their environment.
    Marked processes that are left over are killed, and ServeFailed is raised. `command` replaces `preft serve` in
    tests. Also raises ServeFailed if the server isn't ready after `ready_seconds`.
    """
    mark = f"PREFT_SERVED_BY={uuid.uuid4().hex}"
    name, _, value = mark.partition("=")
    base = command or (sys.executable, "-m", "preft.cli", "serve")
    started = time.monotonic()
    with _signals_end_it() as signalled:
        with log.open("wb") as output:
            process = subprocess.Popen(
                bound([*base, *arguments, "--port", "0", "--state-dir", str(state_dir)]),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, name: value, "PYTHONUNBUFFERED": "1"},
                start_new_session=True,  # Ctrl-C reaches this process alone, which ends the server in order
            )
        try:
            url = _wait_until_ready(process, log, started + ready_seconds)
            yield Served(url, process.pid, state_dir, time.monotonic() - started)
        except BaseException:
            signalled.set()
            with contextlib.suppress(ServeFailed):
                _stop(process, mark, log)
            raise
        signalled.set()
        _stop(process, mark, log)


@contextmanager
def _signals_end_it() -> Iterator[threading.Event]:
    """The first signal sets the event; SIGINT raises KeyboardInterrupt, SIGTERM and SIGHUP raise SystemExit.

    While the event is set, signals do nothing. Signals often come twice: `timeout` signals its whole process group, and
    `make` forwards its signal. The second signal must not interrupt the clean-up after the first. Changes nothing
    outside the main thread.
    """
    signalled = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield signalled
        return

    def leave(number: int, frame: object) -> None:
        if not signalled.is_set():
            signalled.set()
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    wanted = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, leave) for number in wanted}
    try:
        yield signalled
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def marked_processes(mark: str) -> list[int]:
    """Pids of the live processes whose environment holds `mark` (`NAME=value`)."""
    wanted, found = mark.encode(), []
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if folder.name.isdigit() and wanted in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return found


def _wait_until_ready(process: subprocess.Popen[bytes], log: Path, deadline: float) -> str:
    while True:
        if ready := READY.search(log.read_text(errors="replace")):
            return ready[1]
        if process.poll() is not None:
            raise ServeFailed(f"preft serve ended with status {process.returncode}:\n{_tail(log)}")
        if time.monotonic() > deadline:
            raise ServeFailed(f"preft serve didn't get ready in time:\n{_tail(log)}")
        time.sleep(0.2)


def _stop(process: subprocess.Popen[bytes], mark: str, log: Path) -> None:
    """Ends the server and waits for the end of all its processes. Raises ServeFailed if processes had to be killed."""
    problem = ""
    if process.poll() is not None:
        problem = f"preft serve had ended with status {process.returncode}"
    else:
        process.terminate()  # a shell's background job would ignore SIGINT
        try:
            if process.wait(STOP_SECONDS) != 0:
                problem = f"preft serve ended with status {process.returncode} after SIGTERM"
        except subprocess.TimeoutExpired:
            problem = f"preft serve didn't end within {STOP_SECONDS:g} s after SIGTERM"
    left = _remaining(mark, STOP_SECONDS / 4)
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()
    _remaining(mark, STOP_SECONDS / 4)
    if left and not problem:
        problem = f"preft serve left {len(left)} processes running"
    if problem:
        raise ServeFailed(f"{problem}:\n{_tail(log)}")


def _remaining(mark: str, seconds: float) -> list[int]:
    """Pids of marked processes that still run after at most `seconds`."""
    deadline = time.monotonic() + seconds
    while (left := marked_processes(mark)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-TAIL_LINES:])
