"""`preft gateway` and `preft worker`: flags become settings of a process that joins others."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from preft.cli import main
from preft.core.cluster import Role
from preft.core.settings import Settings

STATE = ["--state", "redis://host:6379/0"]


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> list[Settings]:
    received: list[Settings] = []
    module = ModuleType("preft.cluster.join")
    module.join = received.append  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "preft.cluster.join", module)
    return received


@pytest.fixture
def worked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Settings, role and name of each worker."""
    received: list[tuple[Any, ...]] = []
    module = ModuleType("preft.cluster.worker_process")
    module.work = lambda *arguments: received.append(arguments)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "preft.cluster.worker_process", module)
    return received


def test_every_flag_of_a_gateway_reaches_its_setting(joined: list[Settings], tmp_path: Path) -> None:
    argv = ["gateway", *STATE, "--model", str(tmp_path / "llama"), "--adapter", f"alice={tmp_path}/a", "--port", "0"]
    argv += ["--served-model-name", "base", "--host", "0.0.0.0", "--grpc-port", "9000", "--max-model-len", "512"]
    argv += ["--adapter-dir", str(tmp_path / "many"), "--state-dir", str(tmp_path), "--set", "router.retries=3"]
    assert main(argv) == 0
    (settings,) = joined
    assert settings.model == tmp_path / "llama"
    assert settings.adapters == {"alice": f"{tmp_path}/a"}
    assert (settings.model_name, settings.host, settings.port, settings.grpc_port) == ("base", "0.0.0.0", 0, 9000)
    assert (settings.max_model_len, settings.adapter_dir, settings.state_dir) == (512, tmp_path / "many", tmp_path)
    assert settings.state is not None
    assert settings.state.get_secret_value() == STATE[1]
    assert settings.router.retries == 3


def test_every_flag_of_a_worker_arrives(worked: list[tuple[Any, ...]], tmp_path: Path) -> None:
    config = tmp_path / "cluster.yaml"
    config.write_text("model: /m\nhost: 10.0.0.9\nstate: redis://:hidden@host/0\n")
    argv = ["worker", "--role", "decode", "--config", str(config), "--host", "10.0.0.5", "--id", "rack-3.d_1"]
    argv += ["--dtype", "bfloat16", "--max-model-len", "512", "--state-dir", str(tmp_path)]
    argv += ["--port", "7000", "--advertise-host", "Decode-1.example.com"]
    assert main([*argv, "--set", "decode.max_num_seqs=7"]) == 0
    ((settings, role, name),) = worked
    assert (role, name) == (Role.DECODE, "rack-3.d_1")
    own = settings.worker
    assert (own.host, own.port, own.advertise_host) == ("10.0.0.5", 7000, "decode-1.example.com")
    assert settings.host == "10.0.0.9"  # the gateways' own
    assert (settings.dtype, settings.max_model_len, settings.decode.max_num_seqs) == ("bfloat16", 512, 7)
    assert settings.state.get_secret_value() == "redis://:hidden@host/0"


def test_a_worker_is_of_this_machine_by_default(worked: list[tuple[Any, ...]]) -> None:
    assert main(["worker", "--role", "prefill", "--model", "/m", *STATE]) == 0
    assert worked[0][1:] == (Role.PREFILL, None)
    own = worked[0][0].worker
    assert (own.host, own.port, own.advertise_host) == ("127.0.0.1", 0, None)


@pytest.mark.parametrize("command", [["gateway"], ["worker", "--role", "decode"]])
def test_what_a_part_needs_is_said(
    joined: list[Settings], worked: list[object], capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    for argv, part in (
        (["--model", "/m"], "--state URL"),
        (STATE, "--model DIR"),
        (["--model", "/m", "--state", "redis://:hidden@host/0"], "every user of this machine can read flags"),
        (["--model", "/m", *STATE, "--set", "cluster_secret=x"], "every user of this machine can read flags"),
    ):
        assert main([*command, *argv]) == 1
        said = capsys.readouterr().err
        assert part in said
        assert "hidden" not in said
    assert joined == worked == []


def test_the_environment_counts_for_both(
    joined: list[Settings], worked: list[tuple[Any, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "cluster.yaml"
    config.write_text("model: /m\nseed: 1\nport: 1\n")
    (tmp_path / "url").write_text("redis://:hidden@host/0\n")
    given = {"CONFIG": str(config), "STATE_FILE": str(tmp_path / "url"), "CLUSTER_SECRET": "hidden in a variable"}
    given |= {"ROUTER__RETRIES": "3", "PORT": "2", "WORKER__HOST": "0.0.0.0", "WORKER__ADVERTISE_HOST": "[fd00::5]"}
    for name, text in given.items():
        monkeypatch.setenv(f"PREFT_{name}", text)
    assert main(["gateway", "--port", "3"]) == 0
    assert "PREFT_CLUSTER_SECRET" not in os.environ  # no child process gets it
    monkeypatch.setenv("PREFT_CLUSTER_SECRET", given["CLUSTER_SECRET"])
    assert main(["worker", "--role", "prefill"]) == 0
    for settings, port in ((joined[0], 3), (worked[0][0], 2)):
        assert (settings.model, settings.seed, settings.router.retries, settings.port) == (Path("/m"), 1, 3, port)
        assert settings.state.get_secret_value() == "redis://:hidden@host/0"
        assert settings.cluster_secret.get_secret_value() == given["CLUSTER_SECRET"]
        assert (settings.worker.host, settings.worker.advertise_host) == ("0.0.0.0", "fd00::5")


@pytest.mark.parametrize(
    "argv",
    [
        ["worker", "--model", "/m", *STATE],
        ["worker", "--model", "/m", *STATE, "--role", "cook"],
        ["worker", "--model", "/m", *STATE, "--role", "decode", "--id", "a b"],
        ["worker", "--model", "/m", *STATE, "--role", "decode", "--port", "high"],
        ["gateway", "--model", "/m", *STATE, "--prefill", "2"],
    ],
)
def test_wrong_usage_is_status_2(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
