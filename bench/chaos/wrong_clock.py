"""A process whose clock is wrong. Needs gcc."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from preft.core.errors import PreftError

SOURCE = Path(__file__).with_name("clock_ahead.c")


def missing() -> str | None:
    """Why no clock can be wrong here; None if it can."""
    return None if shutil.which("gcc") else "a wrong clock needs gcc"


def clock_ahead(seconds: int, folder: Path) -> dict[str, str]:
    """Environment variables that set a process's clock ahead. The library is made in `folder`. Raises PreftError."""
    library = folder / "clock_ahead.so"
    if not library.exists():
        command = ["gcc", "-shared", "-fPIC", "-O2", "-o", str(library), str(SOURCE), "-ldl"]
        made = subprocess.run(command, capture_output=True, text=True, check=False)
        if made.returncode != 0:
            raise PreftError(f"the library for a wrong clock can't be made: {made.stderr.strip()}")
    return {"LD_PRELOAD": str(library), "CLOCK_AHEAD": str(seconds)}
