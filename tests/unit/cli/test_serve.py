"""`preft serve`: flags become settings, flags win over the file, and mistakes name the key."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

from preft.cli import main
from preft.core.settings import Settings


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Settings]:
    """The settings that a cluster would have been started with."""
    received: list[Settings] = []
    module = ModuleType("preft.cluster.serve")
    module.serve = received.append  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "preft.cluster.serve", module)
    return received


def test_every_flag_reaches_its_setting(served: list[Settings], tmp_path: Path) -> None:
    argv = ["serve", "--model", str(tmp_path / "llama"), "--adapter", "alice=a", "--adapter", f"bob={tmp_path}/b=1"]
    argv += ["--prefill", "2", "--decode", "3", "--served-model-name", "base", "--host", "0.0.0.0", "--port", "0"]
    argv += ["--grpc-port", "9000", "--dtype", "bfloat16", "--max-model-len", "512", "--state-dir", str(tmp_path)]
    argv += ["--adapter-dir", str(tmp_path / "many"), "--state", "redis://host:6379/0"]
    argv += ["--set", "decode.max_num_seqs=7", "--set", "router.request_timeout=1.5", "--set", "seed=4"]
    assert main(argv) == 0
    (settings,) = served
    assert settings.model == tmp_path / "llama"
    assert settings.adapters == {"alice": str(Path.cwd() / "a"), "bob": f"{tmp_path}/b=1"}
    assert settings.adapter_dir == tmp_path / "many"
    assert (settings.prefill.replicas, settings.decode.replicas, settings.decode.max_num_seqs) == (2, 3, 7)
    assert (settings.model_name, settings.host, settings.port, settings.grpc_port) == ("base", "0.0.0.0", 0, 9000)
    assert (settings.dtype, settings.max_model_len, settings.state_dir) == ("bfloat16", 512, tmp_path)
    assert (settings.router.request_timeout, settings.seed) == (1.5, 4)
    assert settings.state is not None
    assert settings.state.get_secret_value() == "redis://host:6379/0"


@pytest.mark.parametrize("url", ["redis://u:hidden@host/0", "rediss://:hidden@h", "unix:///s?password=hidden"])
@pytest.mark.parametrize("flag", ["--state", "--set"])
def test_a_store_with_a_password_belongs_into_the_file(
    served: list[Settings], tmp_path: Path, capsys: pytest.CaptureFixture[str], url: str, flag: str
) -> None:
    assert main(["serve", "--model", "/m", flag, url if flag == "--state" else f"state={url}"]) != 0
    said = capsys.readouterr().err
    assert "state: every user of this machine can read flags" in said
    assert "hidden" not in said
    config = tmp_path / "cluster.yaml"
    config.write_text(f"model: /m\nstate: {url}\n")
    assert main(["serve", "--config", str(config)]) == 0
    assert served[0].state is not None
    assert "hidden" not in repr(served) + served[0].model_dump_json() + str(served[0])
    assert main(["serve", "--model", "/m", "--state", "redis://user@host"]) == 0


def test_flags_win_over_the_file_and_leave_the_rest(served: list[Settings], tmp_path: Path) -> None:
    config = tmp_path / "cluster.yaml"
    config.write_text(
        "model: /m\nport: 1\nhost: h\nprefill: {replicas: 4, max_loras: 2}\nadapters: {alice: /a, bob: /b}\n"
    )
    assert main(["serve", "--config", str(config), "--port", "2", "--prefill", "5", "--adapter", "bob=/c"]) == 0
    (settings,) = served
    assert (settings.host, settings.port) == ("h", 2)
    assert (settings.prefill.replicas, settings.prefill.max_loras) == (5, 2)
    assert settings.adapters == {"alice": "/a", "bob": "/c"}


def test_a_named_flag_wins_over_set(served: list[Settings]) -> None:
    assert main(["serve", "--model", "/m", "--port", "2", "--set", "port=1"]) == 0
    assert served[0].port == 2


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        ([], "--model"),
        (["--model", "/m", "--prefill", "0"], "prefill.replicas"),
        (["--model", "/m", "--dtype", "int8"], "dtype"),
        (["--model", "/m", "--set", "decode.max_loras=1"], "decode.max_loras"),
        (["--model", "/m", "--set", "seed=[1"], "seed"),
        (["--model", "/m", "--set", "decode={replicas: 1, replicas: 2}"], "decode: line 1 repeats the key 'replicas'"),
        (["--model", "/m", "--set", "prefill=3", "--prefill", "2"], "prefill"),
        (["--model", "/m", "--set", "adapters=5", "--adapter", "a=/x"], "--adapter: adapters is already set"),
        (["--model", "/m", "--set", "adapters=null", "--adapter", "a=/x"], "--adapter: adapters is already set"),
        (["--model", "/m", "--adapter", "a=/x", "--adapter", "a=/y"], "'a' is given twice"),
        (["--config", "/no/such/file.yaml"], "/no/such/file.yaml"),
    ],
)
def test_mistakes_name_the_key(
    served: list[Settings], capsys: pytest.CaptureFixture[str], argv: list[str], part: str
) -> None:
    assert main(["serve", *argv]) == 1
    assert part in capsys.readouterr().err
    assert served == []


@pytest.mark.parametrize("argv", [["--adapter", "alice"], ["--adapter", "=dir"], ["--set", "port"], ["--set", ".x=1"]])
def test_malformed_pairs_are_wrong_usage(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["serve", "--model", "/m", *argv])
    assert stop.value.code == 2
