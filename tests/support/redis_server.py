"""A real Redis server on a free port of 127.0.0.1, which tests stop, kill, freeze, empty and start again."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PROGRAM = "redis-server"
MISSING = f"{PROGRAM} is not installed, and tests of the state store need it (Debian, Ubuntu: apt install redis-server)"
START_SECONDS = 20.0
PR_SET_PDEATHSIG = 1


class RedisServer:
    """One server with its data under `folder`. A killed server loses no acknowledged write. `stop` ends the process."""

    def __init__(self, folder: Path, *arguments: str, password: str = "", port: int = 0) -> None:
        """Starts the server, with further `arguments` of its command line."""
        self._folder = folder
        self._arguments = arguments
        self._password = password
        self.port = port or free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def url(self, login: str = "") -> str:
        """The server's URL; `login` is `user:password@`, by default the right password, if there is one."""
        if not login and self._password:
            login = f":{self._password}@"
        return f"redis://{login}127.0.0.1:{self.port}/0"

    def start(self) -> None:
        """Starts a stopped server with the data on its disk. Returns once it answers."""
        if self._process is not None and self._process.poll() is None:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        own = ["--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self._folder)]
        own += ["--appendonly", "yes", "--save", "", "--logfile", "redis.log"]
        own += ["--requirepass", self._password] if self._password else []
        self._process = subprocess.Popen([PROGRAM, *own, *self._arguments], preexec_fn=_end_with_parent)
        self.wait_ready()

    def wait_ready(self) -> None:
        give_up = time.monotonic() + START_SECONDS
        while True:
            try:
                if self.command("PING").startswith("+PONG"):
                    return
            except OSError:
                pass
            if self._process is None or self._process.poll() is not None or time.monotonic() > give_up:
                raise RuntimeError((self._folder / "redis.log").read_text())
            time.sleep(0.02)

    def stop(self) -> None:
        """Ends the server in order."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """Ends the server as a crash would."""
        self._end(signal.SIGKILL)

    def restart(self, *, with_data: bool) -> None:
        """Kills the server and starts it again, with what it had, or with nothing."""
        self.kill()
        if not with_data:
            shutil.rmtree(self._folder)
        self.start()

    def freeze(self) -> None:
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        self.freeze()
        try:
            yield
        finally:
            self.thaw()

    def empty(self) -> None:
        """Removes all data."""
        self.command("FLUSHALL")

    def command(self, *words: str) -> str:
        """The server's raw reply, as far as it comes in one piece. Raises OSError."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=5) as connection:
            if self._password:
                connection.sendall(_packed("AUTH", self._password))
                connection.recv(1 << 16)
            connection.sendall(_packed(*words))
            return connection.recv(1 << 20).decode()

    def _end(self, number: signal.Signals) -> None:
        if self._process is not None:
            self._signal(signal.SIGCONT)
            self._signal(number)
            self._process.wait(START_SECONDS)
            self._process = None

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(number)


@contextmanager
def running_redis(folder: Path, *arguments: str, password: str = "") -> Iterator[RedisServer]:
    """A server that ends with the context."""
    server = RedisServer(folder, *arguments, password=password)
    try:
        yield server
    finally:
        server.stop()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def is_installed() -> bool:
    return shutil.which(PROGRAM, path=os.environ.get("PATH")) is not None


def _end_with_parent() -> None:
    """In the child: a killed test run leaves no server behind."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _packed(*words: str) -> bytes:
    parts = [f"*{len(words)}\r\n", *(f"${len(word.encode())}\r\n{word}\r\n" for word in words)]
    return "".join(parts).encode()
