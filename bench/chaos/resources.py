"""What a cluster holds: processes, open files, files on disk, and what ended processes left in shared memory. Linux."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from preft_loadgen.served import marked_processes

SHARED = Path("/dev/shm")
SHARED_NAMES = ("psm_", "sem.mp-", "torch_", "plasma", "ray", "vllm", "preft")  # other programs have others
MORE_DESCRIPTORS = 1.25  # of the start value: connections come and go


def held(mark: str, servers: Iterable[int], state_dir: Path) -> dict[str, int]:
    """Counts of the marked processes, of the descriptors of `servers` (pids), and of files that are left behind:

    unfinished copies of adapters in `state_dir`, and shared memory that no process uses.
    """
    return {
        "processes": len(marked_processes(mark)),
        "descriptors": sum(map(_descriptors, servers)),
        "unfinished_copies": len(list(state_dir.rglob(".unfinished-*"))),
        "abandoned_shared_memory": len(_abandoned()),
    }


def more_than(before: dict[str, int], now: dict[str, int]) -> dict[str, str]:
    """What is more than before, as `before -> now`."""
    limits = {**before, "descriptors": round(before["descriptors"] * MORE_DESCRIPTORS)}
    return {key: f"{before[key]} -> {value}" for key, value in now.items() if value > limits[key]}


def _descriptors(pid: int) -> int:
    with suppress(OSError):
        return len(os.listdir(f"/proc/{pid}/fd"))
    return 0


def _abandoned() -> set[str]:
    """Files in shared memory that no process has mapped or open."""
    files = {str(path) for path in SHARED.iterdir() if path.name.startswith(SHARED_NAMES)}
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            maps = (process / "maps").read_text(errors="replace")
            files -= {path for path in files if path in maps}
            files -= {os.readlink(link) for link in (process / "fd").iterdir()}
    return files
