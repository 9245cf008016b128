"""What the processes of a cluster hold: processes, open files, and files on disk and in shared memory. Linux only."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from preft_loadgen.served import marked_processes

SHARED = Path("/dev/shm")
FOLDERS = ("adapters", "uploads", "models")  # of a state_dir
MORE_DESCRIPTORS = 1.25  # of the start value: connections come and go


def held(mark: str, servers: Iterable[int], state_dir: Path) -> dict[str, int]:
    """Counts of the marked processes, the descriptors of `servers` (pids), files in `state_dir`, and shared memory.

    Log files and the store's own files aren't counted.
    """
    return {
        "processes": len(marked_processes(mark)),
        "descriptors": sum(map(_descriptors, servers)),
        "files": sum(
            _files(folder) for folder in (state_dir / "adapters", state_dir / "uploads", state_dir / "models")
        ),
        "shared_memory_files": len(list(SHARED.iterdir())),
    }


def more_than(before: dict[str, int], now: dict[str, int]) -> dict[str, str]:
    """What is more than before, as `before -> now`."""
    limits = {**before, "descriptors": round(before["descriptors"] * MORE_DESCRIPTORS)}
    return {key: f"{before[key]} -> {value}" for key, value in now.items() if value > limits[key]}


def _descriptors(pid: int) -> int:
    with suppress(OSError):
        return len(os.listdir(f"/proc/{pid}/fd"))
    return 0


def _files(folder: Path) -> int:
    return sum(len(files) for _, _, files in os.walk(folder))
