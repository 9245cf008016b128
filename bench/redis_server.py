"""A Redis server of a benchmark alone, which can be killed, frozen and emptied."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from preft.core.errors import PreftError
from preft_loadgen.child import bound

START_SECONDS = 20.0


class RedisServer:
    """Keeps its data on disk: a killed server that starts again has them all. `stop` ends the process.

    `url` is a port of this machine, `socket_url` a socket in the file system.
    """

    def __init__(self, folder: Path) -> None:
        """Starts the server. Raises PreftError if `redis-server` isn't installed or doesn't start."""
        if shutil.which("redis-server") is None:
            raise PreftError("redis-server isn't installed: apt install redis-server")
        with socket.create_server(("127.0.0.1", 0)) as free:
            self._port: int = free.getsockname()[1]
        self._folder = folder
        self.socket_url = f"unix://{folder / 'redis.sock'}?db=0"
        folder.mkdir(exist_ok=True)
        self.start()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self._port}/0"

    def start(self) -> None:
        options = ["--port", str(self._port), "--bind", "127.0.0.1", "--dir", str(self._folder)]
        options += ["--unixsocket", "redis.sock", "--appendonly", "yes", "--save", ""]
        self._process = subprocess.Popen(bound(["redis-server", *options]), stdout=subprocess.DEVNULL)
        end = time.monotonic() + START_SECONDS
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > end:
                raise PreftError("redis-server doesn't start")
            time.sleep(0.05)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def freeze(self) -> None:
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def empty(self) -> None:
        """Removes all data."""
        self._command(b"FLUSHALL\r\n")

    def stop(self) -> None:
        self.thaw()
        self._process.terminate()
        self._process.wait()

    def _answers(self) -> bool:
        try:
            return self._command(b"PING\r\n").startswith(b"+PONG")
        except OSError:
            return False

    def _command(self, line: bytes) -> bytes:
        with socket.create_connection(("127.0.0.1", self._port), timeout=5) as connection:
            connection.sendall(line)
            return connection.recv(1 << 16)


@contextmanager
def running_redis(folder: Path) -> Iterator[RedisServer]:
    """A server that ends with the context."""
    server = RedisServer(folder)
    try:
        yield server
    finally:
        server.stop()
