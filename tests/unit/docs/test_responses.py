"""The examples of docs/responses.md run as they are written, and the page names what the bodies refuse."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from preft.gateway.bodies.responses import RESPONSES_PARAMETERS
from support.sdk_gateway import ScriptedGateway, gateway_in_thread
from support.small_tokenizers import byte_level

PAGE = (Path(__file__).parents[3] / "docs" / "responses.md").read_text()
EXAMPLES = re.findall(r"\*\*([^*]+)\*\*[^`]*```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScriptedGateway]:
    with gateway_in_thread(byte_level(tmp_path_factory.mktemp("model"))) as gateway:
        gateway.call(gateway.catalog.add("alice", "/adapters/alice"))
        yield gateway


def test_all_examples_are_found() -> None:
    assert len(EXAMPLES) == 3 == PAGE.count("```python")


@pytest.mark.parametrize(("title", "code"), EXAMPLES, ids=[title for title, _ in EXAMPLES])
def test_the_example_runs(gateway: ScriptedGateway, title: str, code: str) -> None:
    environment = {**os.environ, "PREFT_URL": gateway.urls["http"], "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, "-W", "error", "-c", code]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=200)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip()
    assert {request.adapter.name for request in gateway.generator.requests if request.adapter} == {"alice"}


@pytest.mark.parametrize("name", ["previous_response_id", "conversation", "background", "prompt"])
def test_refused_parameters_are_named(name: str) -> None:
    refused = PAGE.split("Refused with a 400")[1].split("\n\n")[0]
    assert f"`{name}" in refused
    assert name in RESPONSES_PARAMETERS.unsupported
