"""The log files of one run of a server process: one for the command, one per worker. Owns their folder and its size."""

from __future__ import annotations

import fcntl
import logging
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from preft.core.errors import ConfigError

KEPT_RUNS = 20
TAIL_BYTES = 1 << 20
FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_CAUSE = re.compile(r"(?:^|\s|\))((?:[A-Za-z_][\w.]*)?(?:Error|Exception|Interrupt)): (\S.*)$")


def new_log_folder(state_dir: Path, name: str) -> Path:
    """Makes the folder for this run's logs, and removes the logs of the oldest ended runs. Raises ConfigError."""
    root = state_dir / "logs"
    folder = root / f"{time.strftime('%Y%m%d-%H%M%S')}-{name}"
    try:
        state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)  # made here first, private: it also holds the secret
        folder.mkdir(parents=True)
        for old in sorted(root.iterdir())[:-KEPT_RUNS]:
            if not _in_use(old):
                shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise ConfigError(
            f"state_dir: {state_dir} can't be written ({error.strerror}): choose another folder with --state-dir"
        ) from error
    return folder


def _in_use(folder: Path) -> bool:
    """Whether the run that logs to `folder` still goes on."""
    try:
        with _locked(folder, fcntl.LOCK_EX | fcntl.LOCK_NB):
            return False
    except BlockingIOError:
        return True


def keep_folder(folder: Path) -> None:
    """Lets nobody remove the run's `folder` before this process ends."""
    fcntl.flock(os.open(folder, os.O_RDONLY | os.O_CLOEXEC), fcntl.LOCK_SH)


@contextmanager
def _locked(folder: Path, kind: int) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, kind)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def logging_to(log: Path) -> Iterator[None]:
    """Within the context, log records go to the file `log`; PreFT's own warnings also go to stderr in one line."""
    file = logging.FileHandler(log)
    file.setFormatter(logging.Formatter(FORMAT))
    shown = _own_warnings(sys.stderr)
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.INFO)
    root.addHandler(file)
    root.addHandler(shown)
    try:
        with _locked(log.parent, fcntl.LOCK_SH):
            yield
    finally:
        root.setLevel(level)
        root.removeHandler(shown)
        root.removeHandler(file)
        file.close()


def _own_warnings(stream: TextIO) -> logging.Handler:
    shown = logging.StreamHandler(stream)
    shown.setFormatter(_OneLine())
    shown.setLevel(logging.WARNING)
    shown.addFilter(logging.Filter("preft"))
    return shown


class _OneLine(logging.Formatter):
    """A format without the traceback; the file has the traceback."""

    def format(self, record: logging.LogRecord) -> str:
        return f"{record.levelname.lower()}: {record.getMessage()}"


def output_to(log: Path) -> None:
    """Appends all output and log records of this process and its children to the file `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    opened = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    for number in (1, 2):
        os.dup2(opened, number)
    os.close(opened)
    sys.stdout = sys.stderr = open(1, "w", buffering=1, encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115
    logging.basicConfig(level=logging.INFO, format=FORMAT, stream=sys.stderr, force=True)


@contextmanager
def output_in(log: Path) -> Iterator[TextIO]:
    """Within the context, this process writes to `log` as `output_to` says. Yields its real stdout.

    PreFT's own warnings also go to the real stderr in one line.
    """
    streams = sys.stdout, sys.stderr
    sys.stdout.flush()
    sys.stderr.flush()
    with _copy_of(1) as out, _copy_of(2) as err, _locked(log.parent, fcntl.LOCK_SH):
        output_to(log)
        shown = _own_warnings(err)
        logging.getLogger().addHandler(shown)
        try:
            yield out
        finally:
            logging.getLogger().removeHandler(shown)
            sys.stdout.flush()
            sys.stdout, sys.stderr = streams
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)


def _copy_of(descriptor: int) -> TextIO:
    return open(os.dup(descriptor), "w", buffering=1, encoding="utf-8", errors="replace")


def cause_in(log: Path) -> str | None:
    """The last error in the log that doesn't just report another process's error; None if there is none."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - TAIL_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        found = _CAUSE.search(line)
        if found is not None and "Engine core initialization failed" not in found[2] and "cause" not in found[2]:
            return f"{found[1].rpartition('.')[2]}: {found[2]}"
    return None
