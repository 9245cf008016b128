"""The examples of docs/client.md run as they are written, against a gateway over fake workers."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from support.sdk_gateway import ScriptedGateway

from .conftest import Served

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "client.md").read_text()
EXAMPLES = re.findall(r"\*\*([^*]+)\*\*[^`]*(?:`[^`\n]+`[^`]*)*?```python\n(.*?)```", PAGE, re.DOTALL)


def test_all_examples_are_found() -> None:
    assert len(EXAMPLES) == 7 == PAGE.count("```python")


@pytest.mark.parametrize(("title", "code"), EXAMPLES, ids=[title for title, _ in EXAMPLES])
def test_the_example_runs(served: Served, parsing_gateway: ScriptedGateway, title: str, code: str) -> None:
    parsing_gateway.reset()
    parsing_gateway.call(parsing_gateway.catalog.add("alice", "/alice"))
    parsing_gateway.say('[{"name": "weather", "parameters": {"city": "Lisbon"}}]', "sunny")
    environment = {
        "PYTHONPATH": str(ROOT / "client"),
        "PREFT_URL": (parsing_gateway if title.startswith("Tools") else served).urls["http"],
        "ADAPTER_FOLDER": str(served.loras[0]),
    }
    command = [sys.executable, "-W", "error", "-c", code]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=200)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout
    assert served.cluster.idle()
