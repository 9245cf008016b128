"""vLLM's own OpenAI server as a child process, with or without adapters."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from preft.core.errors import PreftError
from preft_loadgen.child import bound

STOP_SECONDS = 60.0
TAIL = 4000  # characters


@contextmanager
def vllm_server(
    arguments: Sequence[str], log: Path, ready_seconds: float, adapters: Mapping[str, Path] | None = None
) -> Iterator[str]:
    """Runs `vllm serve` with `arguments` and yields its URL. Adapters are loaded at the start, by name.

    The output goes to the file `log`. Raises PreftError if the server isn't ready in time.
    """
    port = _free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--port", str(port)]
    if adapters:
        command += ["--enable-lora", "--lora-modules", *(f"{name}={path}" for name, path in adapters.items())]
    environment = {
        **os.environ,
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_USE_V2_MODEL_RUNNER": "0",  # as in PreFT's engines
        "VLLM_PLUGINS": "",  # without ours
    }
    with log.open("wb") as output:
        process = subprocess.Popen(
            bound([*command, *arguments]), stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment
        )
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_until_ready(process, url, log, time.monotonic() + ready_seconds)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _wait_until_ready(process: subprocess.Popen[bytes], url: str, log: Path, deadline: float) -> None:
    while True:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            pass
        if process.poll() is not None or time.monotonic() > deadline:
            raise PreftError(f"vLLM's server isn't ready:\n{log.read_text(errors='replace')[-TAIL:]}")
        time.sleep(0.5)
