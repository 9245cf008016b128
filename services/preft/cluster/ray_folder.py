"""The private folder for the sockets of engines, and for the sockets and logs of a Ray that `preft serve` starts.

A socket's path has room for 107 characters. Ray needs 64 characters below its folder, so a long TMPDIR can't hold it.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

from preft.core.errors import ConfigError

MAX_PATH = 42
_NAME = re.compile(r"preft-(\d+)-\w+")


def new_ray_folder() -> Path:
    """Makes this process's folder, and removes the folders of killed processes. Raises ConfigError."""
    for base in dict.fromkeys((tempfile.gettempdir(), "/tmp", "/var/tmp", "/dev/shm")):
        prefix = f"preft-{os.getpid()}-"
        if len(base) + 1 + len(prefix) + 8 > MAX_PATH:  # mkdtemp adds 8 characters
            continue
        with suppress(OSError):
            _remove_abandoned(Path(base))
            return Path(tempfile.mkdtemp(prefix=prefix, dir=base))
    raise ConfigError(
        "no folder for Ray's sockets: TMPDIR, /tmp and /var/tmp are too long to hold one or can't be written"
    )


def _remove_abandoned(base: Path) -> None:
    """Removes the folders of this user's ended processes."""
    for folder in base.glob("preft-*-*"):
        found = _NAME.fullmatch(folder.name)
        with suppress(OSError):
            is_ours = not folder.is_symlink() and folder.stat().st_uid == os.geteuid()
            if found is not None and is_ours and not Path("/proc", found[1]).exists():
                shutil.rmtree(folder, ignore_errors=True)
