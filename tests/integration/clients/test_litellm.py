"""LiteLLM, unchanged, in an environment of its own: it needs 200 MB beside its dependencies."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from integration.clients.conftest import Door

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]

LITELLM = "litellm>=1.80,<2"
CALLS = Path(__file__).with_name("litellm_calls.py")


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    venv = tmp_path_factory.mktemp("litellm") / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    python = venv / "bin" / "python"
    subprocess.run([str(python), "-m", "pip", "install", "-q", LITELLM], check=True)
    return python


def test_chats_streams_and_errors(door: Door, python: Path) -> None:
    door.say("in Lisbon")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it asks another host for prices
    command = [str(python), str(CALLS), door.url]
    output = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=True).stdout
    told = json.loads(output.splitlines()[-1])
    assert told.pop("usage") == told.pop("streamed_usage") > 3
    assert told == {
        "whole": "in Lisbon",
        "finish_reason": "stop",
        "streamed": "in Lisbon",
        "choices": ["in Lisbon", "in Lisbon"],
        "text": "in Lisbon",
        "missing": 404,
    }
