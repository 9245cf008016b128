"""`make test-compose` names each bad answer, finds its containers, and never uses the settings of a real .env."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from bench.compose.__main__ import KEYS, problem_of
from bench.compose.engine import Engine
from bench.compose.faults import FAULTS
from bench.compose.locks import Locks, make_locks
from bench.compose.stack import Stack, environment
from preft.core.errors import PreftError
from preft.core.settings import TlsSettings
from preft.gateway.access.keys import read_keys
from preft.rpc.tls import Certificates

GOOD: dict[str, Any] = {**dict.fromkeys(KEYS, 0), "sent": 9, "left": {}, "errors": []}
GATEWAY = next(fault for fault in FAULTS if fault.may_cut)
OTHERS = [fault for fault in FAULTS if not fault.may_cut]


@pytest.mark.parametrize("key", KEYS[1:])
def test_each_kind_of_bad_answer_is_a_problem(key: str) -> None:
    for fault in OTHERS:
        assert problem_of(fault, GOOD) is None
        assert problem_of(fault, {**GOOD, key: 2}) == f"{fault.name}: 2 {key} []"
    assert (problem_of(GATEWAY, {**GOOD, key: 2}) is None) == (key == "cut")


def test_what_is_not_given_back_is_a_problem() -> None:
    assert "not given back: {'open_handles': 1}" in str(problem_of(GATEWAY, {**GOOD, "left": {"open_handles": 1}}))


def test_variables_of_the_users_env_have_no_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODEL_DIR", "/elsewhere")
    variables = environment(Locks())
    assert variables["MODEL_DIR"] == "./examples/personal_memory/model"
    assert variables["GATEWAY_PORTS"] == "127.0.0.1::8000"


def engine(folder: Path, script: str) -> Engine:
    program = folder / "docker"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    return Engine(str(program), (str(program), "compose"))


def test_containers_have_the_order_of_their_names(tmp_path: Path) -> None:
    stack = Stack(engine(tmp_path, "printf 'preft-test-gateway-cpu-2 bb\\npreft-test-gateway-cpu-1 aa\\n'"), [])
    assert stack.containers("gateway-cpu") == ["aa", "bb"]


def test_an_engine_that_fails_is_quoted(tmp_path: Path) -> None:
    with pytest.raises(PreftError, match="no such container"):
        engine(tmp_path, "echo no such container >&2; exit 1").run("kill", "aa")


def test_an_unknown_engine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(PreftError, match="neither Docker"):
        Engine.find(None)


def test_locks_are_what_the_processes_read(tmp_path: Path) -> None:
    locks = make_locks(tmp_path)
    settings = yaml.safe_load(Path(locks.environ["CPU_SETTINGS"]).read_text())
    assert "insecure" not in settings
    names = {key: Path(path).name for key, path in settings["tls"].items()}
    files = {key: Path(locks.environ["TLS_DIR"], name) for key, name in names.items()}
    Certificates(TlsSettings(**files))  # tries them in a handshake
    keys = read_keys(Path(locks.environ["SECRETS_DIR"], "api_keys.yaml"))
    found = keys.find(locks.key)
    assert found is not None
    assert found.is_operator
