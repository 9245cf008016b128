"""scripts/install.py hands pip's configuration to uv, and keeps the lists it shares with other files in step."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("install", ROOT / "scripts" / "install.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


script = load_script()


def test_local_folders_that_are_missing_are_left_out(tmp_path: Path) -> None:
    wheels, index = tmp_path / "wheels", tmp_path / "simple"
    wheels.mkdir()
    index.mkdir()
    options = {
        "find-links": f"{wheels} {tmp_path}/no-wheels https://example.org/wheels",
        "extra-index-url": f"{index.as_uri()}\n{tmp_path.as_uri()}/no-index https://example.org/simple",
    }
    links = ["--find-links", str(wheels), "--find-links", "https://example.org/wheels"]
    indexes = ["--extra-index-url", index.as_uri(), "--extra-index-url", "https://example.org/simple"]
    assert script.uv_arguments(options) == [*links, *indexes, "--index-strategy", "unsafe-best-match"]


def test_every_other_option_has_its_flag() -> None:
    options = {"index-url": "https://m/simple", "trusted-host": "m n", "no-index": "1"}
    hosts = ["--allow-insecure-host", "m", "--allow-insecure-host", "n"]
    assert script.uv_arguments(options) == ["--index-url", "https://m/simple", *hosts, "--no-index"]
    assert script.uv_arguments({"no-index": "0"}) == []


def test_the_environment_gets_the_certificates_unless_it_has_some(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    assert script.uv_environment({"cert": "/ca.pem"})["SSL_CERT_FILE"] == "/ca.pem"
    monkeypatch.setenv("SSL_CERT_FILE", "/own.pem")
    assert script.uv_environment({"cert": "/ca.pem"})["SSL_CERT_FILE"] == "/own.pem"


def test_pip_says_what_is_configured_and_the_environment_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("PIP_"):
            monkeypatch.delenv(name)
    config = tmp_path / "pip.conf"
    config.write_text(
        "[global]\nfind-links = /a\n  /b\nindex-url = https://g/simple\n[install]\nindex-url = https://i/\n"
    )
    monkeypatch.setenv("PIP_CONFIG_FILE", str(config))
    venv = tmp_path / "venv"  # the tests' own environment may have no pip
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    options = script.pip_options(venv / "bin" / "python")
    assert (options["find-links"].split(), options["index-url"]) == (["/a", "/b"], "https://i/")
    monkeypatch.setenv("PIP_FIND_LINKS", "/c")
    assert script.pip_options(venv / "bin" / "python")["find-links"] == "/c"


def test_bytecode_is_compiled_with_every_package(tmp_path: Path) -> None:
    asked, uv = tmp_path / "asked", tmp_path / "uv"
    uv.write_text(f'#!/bin/sh\necho "$@" >> {asked}\n')
    uv.chmod(0o755)
    script._install_with_uv(str(uv), tmp_path / "venv" / "bin" / "python", "cpu", {})
    lines = asked.read_text().splitlines()
    assert len(lines) == 3
    assert all("--compile-bytecode" in line.split() for line in lines)


def test_an_image_gets_neither_the_project_nor_tools_of_its_development(tmp_path: Path) -> None:
    asked, uv = tmp_path / "asked", tmp_path / "uv"
    uv.write_text(f'#!/bin/sh\necho "$@" >> {asked}\n')
    uv.chmod(0o755)
    script._install_with_uv(str(uv), tmp_path / "venv" / "bin" / "python", "cpu", {}, only_dependencies=True)
    torch, dependencies = asked.read_text().splitlines()
    assert script.CPU_TORCH in torch
    assert dependencies.endswith(f"-r {ROOT / 'pyproject.toml'} --extra cpu --extra s3 --extra gs --extra hf")
    assert f"--overrides {script.OVERRIDES}" in dependencies


def test_what_uv_overrides_is_what_pip_takes_away() -> None:
    lines = [line for line in script.OVERRIDES.read_text().splitlines() if not line.startswith("#")]
    assert lines == [f'{name}; python_version < "3"' for name in script.UNWANTED_ON_CPU]


def test_an_up_to_date_environment_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    version = sys.version.split()[0]
    stamp = {"base": [str(tmp_path), version, "cpu"], "inputs": script._digest_of_inputs()}
    (tmp_path / "preft-install.json").write_text(json.dumps(stamp))
    monkeypatch.setattr(script.subprocess, "run", pytest.fail)
    script.install(tmp_path, "cpu")


@pytest.mark.parametrize(
    ("body", "extra"), [("echo 'GPU 0: NVIDIA H200'", "gpu"), ("echo 'no devices'", "cpu"), ("exit 9", "cpu")]
)
def test_a_gpu_counts_only_if_it_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, extra: str
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{body}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert script.detect_extra() == extra
    program.unlink()
    assert script.detect_extra() == "cpu"
