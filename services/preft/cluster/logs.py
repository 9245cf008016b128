"""The log files of one run of `preft serve`: one for the command, one per worker. Owns their folder and its size."""

from __future__ import annotations

import logging
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from preft.core.errors import ConfigError

KEPT_RUNS = 20
TAIL_BYTES = 1 << 20
OWN_LOG = "serve.log"
FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_CAUSE = re.compile(r"(?:^|\s|\))((?:[A-Za-z_][\w.]*)?(?:Error|Exception|Interrupt)): (\S.*)$")


def new_log_folder(state_dir: Path, cluster_id: str) -> Path:
    """Makes the folder for this run's logs, and removes the oldest runs' logs. Raises ConfigError."""
    root = state_dir / "logs"
    folder = root / f"{time.strftime('%Y%m%d-%H%M%S')}-{cluster_id}"
    try:
        state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)  # made here first, private: it also holds the secret
        folder.mkdir(parents=True)
        for old in sorted(root.iterdir())[:-KEPT_RUNS]:
            shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise ConfigError(
            f"state_dir: {state_dir} can't be written ({error.strerror}): choose another folder with --state-dir"
        ) from error
    return folder


@contextmanager
def logging_to(folder: Path) -> Iterator[None]:
    """Within the context, log records go to a file in `folder`; PreFT's own warnings also go to stderr in one line."""
    file = logging.FileHandler(folder / OWN_LOG)
    file.setFormatter(logging.Formatter(FORMAT))
    shown = logging.StreamHandler(sys.stderr)
    shown.setFormatter(_OneLine())
    shown.setLevel(logging.WARNING)
    shown.addFilter(logging.Filter("preft"))
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.INFO)
    root.addHandler(file)
    root.addHandler(shown)
    try:
        yield
    finally:
        root.setLevel(level)
        root.removeHandler(shown)
        root.removeHandler(file)
        file.close()


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
