"""A start of Ray that fails is tried once more, and leaves nothing."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest
import ray

from preft.cluster.local_ray import start_ray
from preft.core.errors import ConfigError

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")  # Ray, too, leaves its processes


class SlowRay:
    """`ray.init` of a machine on which the first starts fail."""

    def __init__(self, failures: int) -> None:
        self.failures = failures
        self.folders: list[Path] = []
        self.processes: list[subprocess.Popen[bytes]] = []

    def __call__(self, *, _temp_dir: str, **options: object) -> None:
        self.folders.append(Path(_temp_dir))
        command = ["python3", "-c", "import time; time.sleep(60)", f"--session={_temp_dir}/session"]
        self.processes.append(process := subprocess.Popen(command))
        while _temp_dir.encode() not in Path(f"/proc/{process.pid}/cmdline").read_bytes():
            time.sleep(0.01)  # `Popen` returns a moment before the kernel shows the arguments
        if len(self.folders) <= self.failures:
            raise Exception("The current node timed out during startup.")  # Ray's own class

    def ended(self) -> list[bool]:
        """Of each start, whether its process has been killed."""
        ends = []
        for process in self.processes:
            try:
                ends.append(process.wait(0.5) != 0)
            except subprocess.TimeoutExpired:
                ends.append(False)
        return ends


def slow_ray(monkeypatch: pytest.MonkeyPatch, failures: int) -> SlowRay:
    slow = SlowRay(failures)
    monkeypatch.setattr(ray, "init", slow)
    return slow


def test_a_failed_start_is_tried_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = slow_ray(monkeypatch, failures=1)
    folder = start_ray()
    try:
        assert slow.folders[1:] == [folder]
        assert [path.exists() for path in slow.folders] == [False, True]
        assert slow.ended() == [True, False]
    finally:
        slow.processes[1].kill()
        slow.processes[1].wait()
        folder.rmdir()


def test_a_second_failed_start_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = slow_ray(monkeypatch, failures=2)
    with pytest.raises(ConfigError, match=r"^Ray can't be started: The current node timed out during startup\.$"):
        start_ray()
    assert not any(path.exists() for path in slow.folders)
    assert slow.ended() == [True, True]
