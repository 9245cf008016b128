"""The Triton kernels themselves where there is no GPU: run by Triton's interpreter, and compiled for GPUs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernels.devices import DEVICE

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

pytestmark = [
    pytest.mark.skipif(DEVICE == "cuda", reason="the other tests run the kernels"),
    pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="this is the interpreter"),
    pytest.mark.timeout(900),
]


def run_with_triton(*arguments: str, **environment: str) -> str:
    """What Python prints, where Triton can be imported."""
    aside = Path(sys.prefix) / "triton"  # `make install` puts it there
    assert aside.is_dir()
    path = os.pathsep.join(map(str, (aside, ROOT / "kernels")))
    ran = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def test_by_the_interpreter() -> None:
    """All tests of this folder once more."""
    said = run_with_triton("-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE), TRITON_INTERPRET="1")
    assert "passed" in said


def test_they_compile_for_gpus(tmp_path: Path) -> None:
    assert "bytes shared" in run_with_triton(str(HERE / "compile_for_gpus.py"), TRITON_CACHE_DIR=str(tmp_path))
