"""A worker that is killed while its engine starts leaves no process behind."""

from __future__ import annotations

import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest

from support.models import make_model
from support.processes import alive, running

pytestmark = [pytest.mark.vllm, pytest.mark.long, pytest.mark.timeout(300)]

ENGINE = b"VLLM::EngineCore"  # vLLM's name of the process, before the engine and its worker have spoken


def engines_of(parent: int) -> list[int]:
    """Pids of the worker's engine processes."""
    found = []
    for tasks in Path(f"/proc/{parent}/task").glob("*/children"):
        with suppress(OSError):  # a child or a thread that has just ended
            children = tasks.read_text().split()
            found += [int(pid) for pid in children if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(ENGINE)]
    return found


def test_an_engine_ends_with_its_worker_before_they_have_spoken(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", "llama")
    arguments = ["--role", "decode", "--model", str(model), "--state", str(tmp_path / "state.sqlite")]
    arguments += ["--state-dir", str(tmp_path / "state"), "--set", "decode.kv_cache_bytes=67108864"]
    with running(["worker", *arguments], tmp_path / "worker.log") as worker:
        end = time.monotonic() + 120
        while not (engines := engines_of(worker.pid)):
            assert time.monotonic() < end, worker.output
            time.sleep(0.01)
        worker.signal(signal.SIGKILL)
        assert worker.ended() == -signal.SIGKILL
        assert "is ready" not in worker.output
        end = time.monotonic() + 10
        while any(map(alive, engines)):
            assert time.monotonic() < end
            time.sleep(0.02)
