"""What each server process of a cluster has: signals that stop it, a socket to listen on, one sentence per error.

`preft serve`, `preft gateway` and `preft worker` run inside `told_in_a_sentence`. Owns no part of a server.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import resource
import signal
import socket
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from preft.core.errors import ConfigError, PreftError
from preft.core.settings import host_and_port

T = TypeVar("T")

logger = logging.getLogger(__name__)

LEAST_FILES = 256  # a server with two workers starts with them, and the workers of one with 64 don't
ENOUGH_FILES = 4096  # by default, 1024 requests may wait, beside those that run
RAISED_BY = "`ulimit -Hn` in a shell, LimitNOFILE= in systemd, --ulimit nofile= in Docker"
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stop:
    """The stop requests to a process: first stop, then stop at once."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.at_once = asyncio.Event()
        self._signals = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]

    def arm(self) -> None:
        """Lets this process's signals ask for the stop, also again after Ray has replaced the handlers."""
        loop = asyncio.get_running_loop()
        for number in self._signals:
            loop.add_signal_handler(number, self._signalled)

    def _signalled(self) -> None:
        (self.at_once if self.asked.is_set() else self.asked).set()


async def unless(stop: asyncio.Event, start: Coroutine[Any, Any, T]) -> T | None:
    """The result of `start`. If `stop` is set earlier, cancels `start` and returns None."""
    starting = asyncio.create_task(start)
    stopped = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({starting, stopped}, return_when=asyncio.FIRST_COMPLETED)
        return None if stop.is_set() else starting.result()
    finally:
        starting.cancel()
        stopped.cancel()
        await asyncio.gather(starting, stopped, return_exceptions=True)


def raise_file_limit() -> None:
    """Lets this process have as many open files and connections as its hard limit allows: each stream needs one.

    Warns of a limit that is low, and raises ConfigError for one with which Ray's processes can't start.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    if most == resource.RLIM_INFINITY or most >= ENOUGH_FILES:
        return
    advice = f"raise the hard limit to {ENOUGH_FILES} or more ({RAISED_BY})"
    if most < LEAST_FILES:
        raise ConfigError(f"this process may open {most} files at once, and needs {LEAST_FILES} at least: {advice}")
    logger.warning(
        "this process may open %d files at once, and each connection of a client needs one: %s", most, advice
    )


def listen_on(host: str, port: int, group: str = "") -> socket.socket:
    """A bound socket. Raises ConfigError, which names the setting, with `group` before it, and the flag."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        family, *_, place = min(found, key=lambda each: each[0] != socket.AF_INET)
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(place)
        except OSError:
            listener.close()
            raise
    except (OSError, ValueError) as error:  # ValueError: malformed names
        is_about_port = isinstance(error, OSError) and error.errno in (errno.EADDRINUSE, errno.EACCES)
        name = "port" if is_about_port else "host"
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(
            f"{group}{name}: can't listen on {host_and_port(host, port)}: {reason}; choose another with --{name}"
        ) from error
    return listener


@contextmanager
def told_in_a_sentence(what: str) -> Iterator[None]:
    """Every error that leaves the context is a PreftError; `what` ends by it. The traceback goes to the log."""
    try:
        yield
    except PreftError:
        raise
    except Exception as error:
        logger.info("%s ends", what, exc_info=error)
        if isinstance(error, OSError) and error.filename is not None:
            raise ConfigError(f"{error.filename}: {error.strerror}") from error
        raise PreftError(f"an unexpected error ended {what}: {type(error).__name__}: {error}") from error
