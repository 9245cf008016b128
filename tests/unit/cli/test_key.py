"""`preft key` and the API key of the commands that ask a server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from starlette.responses import JSONResponse

from preft.cli import main
from preft.cli.server import Server
from preft.core.limits import KeyLimits
from preft.gateway.access.keys import read_keys
from support.served_app import served_in_thread


def made(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[str, str]:
    """The entry and the key."""
    assert main(["key", *arguments]) == 0
    out, err = capsys.readouterr()
    return out, err.splitlines()[-1]


def test_the_printed_entries_know_the_printed_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--tenant", "acme", "--adapters", "team-*", "--adapters", "ann", "--admin"]
    options += ["--requests-per-minute", "5", "--tokens-per-minute", "500", "--concurrent-requests", "2"]
    whole, secret = made(capsys, "whole", *options, "--adapter-bytes", "1GiB")
    plain, other = made(capsys, "plain")
    assert secret not in whole
    path = tmp_path / "keys.yaml"
    path.write_text(whole + plain)
    keys = read_keys(path)
    key = keys.find(secret)
    assert key is not None
    assert (key.name, key.tenant, key.admin, key.adapter_bytes) == ("whole", "acme", True, 1 << 30)
    assert key.limits == KeyLimits(5, 500, 2)
    assert key.may_use("team-1")
    assert not key.may_use("bob")
    found = keys.find(other)
    assert found is not None
    assert (found.name, found.admin) == ("plain", False)
    assert yaml.safe_load(plain)["plain"].keys() == {"sha256"}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["a b"], "'a b' can't name a key"),
        (["a", "--tenant", "x/y"], "a.tenant: a tenant's name has"),
        (["a", "--tokens-per-minute", "0"], "a.tokens_per_minute: "),
        (["a", "--adapter-bytes", "much"], "a.adapter_bytes: "),
    ],
)
def test_what_the_server_would_refuse(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["key", *arguments]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"preft: {says}")


@pytest.fixture
def headers(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str | None]]:
    """What each request shows in Authorization."""
    seen: list[str | None] = []

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        seen.append(dict(scope["headers"]).get(b"authorization", b"").decode() or None)
        body = {"workers": [], "data": [], "has_more": False}
        await JSONResponse(body)(scope, receive, send)

    with served_in_thread(answer) as port:
        monkeypatch.setenv("PREFT_URL", f"http://127.0.0.1:{port}")
        monkeypatch.delenv("PREFT_API_KEY", raising=False)
        yield seen


def test_commands_show_the_key(headers: list[str | None], monkeypatch: pytest.MonkeyPatch) -> None:
    commands = (["status"], ["adapter", "list"], ["loadgen", "--requests", "1"])
    for command in commands:
        main(command)
        main([*command, "--api-key", "flag"])
    monkeypatch.setenv("PREFT_API_KEY", "variable\n")
    for command in commands:
        main(command)
        main([*command, "--api-key", "flag"])
    assert headers == [None, "Bearer flag"] * 3 + ["Bearer variable", "Bearer flag"] * 3


def test_no_text_shows_the_key(
    headers: list[str | None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for bad in ("hunter2\r\nx: y", "hunter2 x", "hunter2ä"):
        monkeypatch.setenv("PREFT_API_KEY", bad)
        assert main(["status"]) == 1
    monkeypatch.setenv("PREFT_API_KEY", "hunter2")
    monkeypatch.setenv("PREFT_URL", "http://127.0.0.1:1")
    assert main(["status"]) == 1
    with pytest.raises(SystemExit):
        main(["status", "--help"])
    assert "hunter2" not in repr(Server("http://h", "hunter2"))
    out, err = capsys.readouterr()
    assert "hunter2" not in out + err
    assert headers == []
