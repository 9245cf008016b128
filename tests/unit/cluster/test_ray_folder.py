"""Ray's folder has a short path whatever TMPDIR is, is private, and doesn't stay when its process was killed."""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path

import pytest

from preft.cluster import ray_folder
from preft.cluster.ray_folder import MAX_PATH, new_ray_folder

SOCKET_PATH = 107
BELOW = "/session_2026-11-26_01-09-11_812355_1234567/sockets/plasma_store"


@pytest.mark.parametrize("length", [10, 70, 200])
def test_sockets_fit_whatever_the_folder_for_temporary_files_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    long = tmp_path / ("t" * length)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    folder = new_ray_folder()
    try:
        assert len(f"{folder}{BELOW}") <= SOCKET_PATH
        assert len(str(folder)) <= MAX_PATH
        assert folder.stat().st_mode & 0o777 == 0o700
    finally:
        folder.rmdir()


def test_folders_of_killed_processes_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_folder, "MAX_PATH", 1000)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    ended = subprocess.Popen(["true"])
    ended.wait()
    names = {f"preft-{ended.pid}-abc": False, f"preft-{os.getppid()}-abc": True, f"preft-{ended.pid}x-abc": True}
    for name in names:
        (tmp_path / name / "session").mkdir(parents=True)
    folder = new_ray_folder()
    assert {name: (tmp_path / name).exists() for name in names} == names
    assert folder.parent == tmp_path
