"""The committed code in preft.rpc is what protoc makes of proto/ today."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMITTED = ROOT / "services" / "preft" / "rpc"
NAMES = sorted(path.stem for path in (ROOT / "proto").glob("*.proto"))
SUFFIXES = ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py")


def generator_version() -> str:
    """The grpcio-tools release that the committed code says it comes from."""
    match = re.search(r"GRPC_GENERATED_VERSION = '([^']+)'", (COMMITTED / "workers_pb2_grpc.py").read_text())
    assert match is not None
    return match[1]


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    installed = importlib.metadata.version("grpcio-tools")
    if installed != generator_version():
        pytest.skip(f"the code was generated with grpcio-tools {generator_version()}, installed is {installed}")
    out = tmp_path_factory.mktemp("rpc")
    flags = [f"--{kind}_out={out}" for kind in ("python", "pyi", "grpc_python")]
    files = [f"proto/{name}.proto" for name in NAMES]
    command = [sys.executable, "-m", "grpc_tools.protoc", "-Ipreft/rpc=proto", *flags, *files]
    subprocess.run(command, cwd=ROOT, check=True)
    return out / "preft" / "rpc"


@pytest.mark.parametrize("name", NAMES)
def test_committed_code_matches_proto(generated: Path, name: str) -> None:
    for suffix in SUFFIXES:
        file = f"{name}{suffix}"
        assert (COMMITTED / file).read_text() == (generated / file).read_text(), f"{file} is stale: run make proto"


def test_no_generated_code_without_a_proto() -> None:
    generated = {path.name for suffix in SUFFIXES for path in COMMITTED.glob(f"*{suffix}")}
    assert generated == {f"{name}{suffix}" for name in NAMES for suffix in SUFFIXES}


def test_generated_code_runs_under_the_declared_floors() -> None:
    """pyproject must not promise a grpcio or protobuf that the generated code refuses."""
    pyproject = (ROOT / "pyproject.toml").read_text()
    gencode = re.search(r"Protobuf Python Version: (\S+)", (COMMITTED / "workers_pb2.py").read_text())
    assert gencode is not None
    assert f'"grpcio>={generator_version()},' in pyproject
    assert f'"protobuf>={gencode[1]},' in pyproject
