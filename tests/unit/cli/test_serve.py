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
    argv += ["--adapter-dir", str(tmp_path / "many")]
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
