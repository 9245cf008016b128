"""Exit statuses and messages of the command as a whole."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from preft.cli import main, parser

SERVICES = Path(__file__).parents[3] / "services"


@pytest.mark.parametrize("argv", [[], ["dance"], ["serve", "--port", "high"], ["adapter"], ["adapter", "add", "alice"]])
def test_wrong_usage_is_status_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    assert "usage: preft" in capsys.readouterr().err


def test_an_error_is_one_line_on_stderr_and_status_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--url", "http://127.0.0.1:1"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("preft: ")
    assert err.count("\n") == 1
    assert "http://127.0.0.1:1" in err


def test_no_traceback_when_the_reader_goes_away(tmp_path: Path) -> None:
    command = f'{sys.executable} -c \'from preft.cli import main; main(["doctor", "--json"])\' | true'
    ran = subprocess.run(["bash", "-c", command], cwd=SERVICES, capture_output=True, text=True, check=False)
    assert ran.stderr == ""


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(name in text for name in ("serve", "adapter", "status", "doctor"))


COMMANDS = [["serve"], ["gateway"], ["worker", "--role", "decode"], ["adapter", "list"], ["status"], ["doctor"]]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_every_command_refuses_an_unknown_variable(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PREFT_MODLE", "/m")
    assert main(command) == 1
    said = capsys.readouterr().err
    assert said.startswith("preft: PREFT_MODLE: there is no such setting")
    assert said.endswith("did you mean PREFT_MODEL?\n")


@pytest.mark.parametrize(
    ("environ", "url"),
    [
        ({}, "http://127.0.0.1:8000"),
        ({"PREFT_URL": "http://127.0.0.1:1"}, "http://127.0.0.1:1"),
        ({"PREFT_URL": "http://127.0.0.1:1", "PREFT_PORT": "2"}, "http://127.0.0.1:1"),
        ({"PREFT_HOST": "0.0.0.0", "PREFT_PORT": "2"}, "http://127.0.0.1:2"),
        ({"PREFT_HOST": "::", "PREFT_PORT": "2"}, "http://[::1]:2"),
        ({"PREFT_HOST": "gpu1.lan"}, "http://gpu1.lan:8000"),
        ({"PREFT_PORT": "tcp://10.0.0.1:8000"}, "http://127.0.0.1:8000"),  # of Kubernetes
    ],
)
def test_the_server_s_address_follows_the_environment(
    environ: dict[str, str], url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in environ.items():
        monkeypatch.setenv(name, text)
    for command in (["status"], ["adapter", "list"], ["loadgen"]):
        assert parser().parse_args(command).url == url
