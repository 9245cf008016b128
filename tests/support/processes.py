"""Server processes of the `preft` command. Each ends with its context, and with its test process."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from preft_loadgen.child import bound

END_SECONDS = 60.0
TESTS = str(Path(__file__).parents[1])


class ServerProcess:
    """`preft ARGUMENTS`, or another module with them, with its output in the file `log`."""

    def __init__(self, arguments: list[str], log: Path, module: str = "preft.cli") -> None:
        self._log = log
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                bound([sys.executable, "-m", module, *arguments]),
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [TESTS, os.environ.get("PYTHONPATH")]))},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def output(self) -> str:
        return self._log.read_text(errors="replace")

    def said(self, pattern: str, seconds: float = 200.0) -> str:
        """Waits for output that matches `pattern`; returns the first group."""
        end = time.monotonic() + seconds
        while (found := re.search(pattern, self.output)) is None:
            if self._process.poll() is not None or time.monotonic() > end:
                raise AssertionError(f"{pattern!r} isn't in the output:\n{self.output}")
            time.sleep(0.1)
        return found[1]

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def ended(self, seconds: float = END_SECONDS) -> int:
        """Waits for the end; returns the exit status."""
        return self._process.wait(seconds)

    def close(self) -> None:
        """Ends a process that still runs: by a signal, or else by force."""
        if self._process.poll() is None:
            for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL):
                self.signal(number)
                try:
                    self._process.wait(END_SECONDS / 4)
                    return
                except subprocess.TimeoutExpired:
                    continue


def alive(pid: int) -> bool:
    """Whether the process runs; a zombie doesn't."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@contextmanager
def running(arguments: list[str], log: Path, module: str = "preft.cli") -> Iterator[ServerProcess]:
    """The process, until the end of the context."""
    process = ServerProcess(arguments, log, module)
    try:
        yield process
    finally:
        process.close()
