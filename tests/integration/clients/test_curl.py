"""curl, as the README and the documents of other servers use it."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from integration.clients.conftest import Door

pytestmark = pytest.mark.skipif(shutil.which("curl") is None, reason="curl isn't installed")

CHAT = '{"model": "ann", "messages": [{"role": "user", "content": "where?"}]}'


def curl(*arguments: str) -> str:
    return subprocess.run(["curl", "-sS", *arguments], capture_output=True, text=True, check=True, timeout=60).stdout


def test_a_chat(door: Door) -> None:
    door.say("in Lisbon")
    reply = curl(f"{door.url}/chat/completions", "--json", CHAT, "-H", "Authorization: Bearer any")
    assert json.loads(reply)["choices"][0]["message"]["content"] == "in Lisbon"


def test_a_stream_comes_as_lines(door: Door) -> None:
    door.say("in Lisbon")
    body = json.dumps({**json.loads(CHAT), "stream": True})
    lines = curl("-N", f"{door.url}/chat/completions", "-H", "Content-Type: application/json", "-d", body).splitlines()
    assert lines[-2:] == ["data: [DONE]", ""]
    events = [json.loads(line.removeprefix("data: ")) for line in lines[:-2] if line]
    assert "".join(event["choices"][0]["delta"]["content"] for event in events) == "in Lisbon"


def test_a_body_from_a_large_file(door: Door, tmp_path: Path) -> None:
    """For bodies of more than a megabyte, curl sends `Expect: 100-continue`."""
    door.say("hello")
    file = tmp_path / "body.json"
    file.write_text(json.dumps({"model": "base", "prompt": "hi", "user": "u", "metadata": {"text": "x" * 2_000_000}}))
    reply = curl(f"{door.url}/completions", "-H", "Content-Type: application/json", "-d", f"@{file}", "--compressed")
    assert json.loads(reply)["choices"][0]["text"] == "hello"


def test_an_error_and_the_metrics(door: Door) -> None:
    refused = curl("-w", "\n%{http_code}", f"{door.url}/chat/completions", "--json", '{"model": "ann"}')
    body, status = refused.rsplit("\n", 1)
    assert (status, json.loads(body)["error"]["param"]) == ("400", "messages")
    assert "preft_requests_total" in curl(f"{door.gateway.urls['http']}/metrics")
