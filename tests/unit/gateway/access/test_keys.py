"""The file of API keys: what it may hold, whose key is found, and how its changes are followed."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from preft.core.errors import ConfigError, Unauthenticated
from preft.core.limits import KeyLimits
from preft.gateway.access.key_file import KeyFile
from preft.gateway.access.keys import Keys, hash_of, new_secret, read_keys
from support.api_keys import access_of, entries, keys_of, secret_of, write_keys
from support.fakes import FakeCatalog

WHOLE: dict[str, Any] = {
    "tenant": "acme",
    "adapters": ["team-*", "ann"],
    "admin": True,
    "requests_per_minute": 5,
    "tokens_per_minute": 500,
    "concurrent_requests": 2,
    "adapter_bytes": "1KiB",
}


def test_a_key_is_found_by_its_text_alone(tmp_path: Path) -> None:
    keys = read_keys(write_keys(tmp_path / "keys.yaml", whole=WHOLE, plain={}))
    whole, plain = keys.find(secret_of("whole")), keys.find(secret_of("plain"))
    assert whole is not None
    assert plain is not None
    assert (whole.name, whole.tenant, whole.admin, whole.adapter_bytes) == ("whole", "acme", True, 1024)
    assert whole.limits == KeyLimits(5, 500, 2)
    assert (plain.tenant, plain.admin, plain.limits, plain.adapter_bytes) == ("", False, KeyLimits(), None)
    for wrong in ("", "x", secret_of("whole")[:-1], secret_of("whole") + "x", hash_of(secret_of("whole")), "\ud800"):
        assert keys.find(wrong) is None
    assert secret_of("whole") not in (tmp_path / "keys.yaml").read_text()


def test_new_keys_are_long_and_differ() -> None:
    secrets = {new_secret() for _ in range(100)}
    assert len(secrets) == 100
    assert all(re.fullmatch(r"preft-[A-Za-z0-9_-]{43}", secret) for secret in secrets)


@pytest.mark.parametrize(
    ("patterns", "allowed", "refused"),
    [
        (["*"], ["a", "org/a b", "é"], []),
        ([], [], ["a", ""]),
        (["team-*"], ["team-", "team-a/b"], ["team", "xteam-", "Team-a"]),
        (["ann", "bob?"], ["ann", "bob1"], ["bob", "anna", "ann\nx"]),
        (["[ab]*"], ["a", "bx"], ["c"]),
        (["cafe\u0301"], ["caf\u00e9"], ["cafe"]),
    ],
)
def test_patterns(patterns: list[str], allowed: list[str], refused: list[str]) -> None:
    key = keys_of(k={"adapters": patterns}).find(secret_of("k"))
    assert key is not None
    assert [name for name in (*allowed, *refused) if key.may_use(name)] == allowed


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ({"sha256": "abc"}, "k.sha256: give the 64 hexadecimal digits"),
        ({"sha256": 5}, "k.sha256: give the 64 hexadecimal digits"),
        ({}, "k.sha256: "),
        ({"key": "preft-..."}, "k."),
        (None, "k: "),
        ({"sha256": "a" * 64, "tenant": "a/b"}, "k.tenant: a tenant's name has"),
        ({"sha256": "a" * 64, "tenant": "@a"}, "k.tenant: a tenant's name has"),
        ({"sha256": "a" * 64, "requests_per_minute": 0}, "k.requests_per_minute: "),
        ({"sha256": "a" * 64, "tokens_per_minute": "many"}, "k.tokens_per_minute: "),
        ({"sha256": "a" * 64, "adapter_bytes": "1 parsec"}, "k.adapter_bytes: "),
        ({"sha256": "a" * 64, "rpm": 3}, "k.rpm: "),
    ],
)
def test_broken_entries(tmp_path: Path, entry: Any, says: str) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(yaml.safe_dump({"k": entry}))
    with pytest.raises(ConfigError, match=f"^api_keys: {path}: {re.escape(says)}"):
        read_keys(path)


@pytest.mark.parametrize("text", ["- a", "k: [", "k: {sha256: 'x'}\nk: {}", "'a b': {}", "1: {}"])
def test_broken_files(tmp_path: Path, text: str) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=str(path)):
        read_keys(path)
    with pytest.raises(ConfigError, match="nowhere"):
        read_keys(tmp_path / "nowhere")


def test_two_names_for_one_key_are_refused(tmp_path: Path) -> None:
    one = entries({"a": {}})["a"]
    (tmp_path / "keys.yaml").write_text(yaml.safe_dump({"a": one, "b": one}))
    with pytest.raises(ConfigError, match="a and b have the same sha256"):
        read_keys(tmp_path / "keys.yaml")


async def test_the_file_is_followed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def known() -> list[str]:
        return [name for name in "abc" if file.keys.find(secret_of(name)) is not None]

    path = write_keys(tmp_path / "keys.yaml", a={}, b={})
    file = KeyFile(path)
    before = file.keys
    await file.look()
    assert file.keys is before
    write_keys(path, b={}, c={})
    await file.look()
    assert known() == ["b", "c"]
    for broken in ("b: {", None):
        caplog.clear()
        if broken is None:
            path.unlink()
        else:
            path.write_text(broken)
        for _ in range(3):
            await file.look()
        assert known() == ["b", "c"]
        assert [record.levelno for record in caplog.records] == [logging.WARNING]
    write_keys(path, a={})
    await file.look()
    assert known() == ["a"]


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer ", "Basic x", secret_of("k"), "Bearer wrong"])
def test_headers_without_a_key(header: str | None) -> None:
    with pytest.raises(Unauthenticated) as raised:
        access_of(FakeCatalog(), k={}).caller(header)
    assert "wrong" not in str(raised.value)


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER", " Bearer "])
def test_a_caller_is_kept_until_the_keys_change(scheme: str) -> None:
    access = access_of(FakeCatalog(), k={"tenant": "t"})
    caller = access.caller(f"{scheme} {secret_of('k')}")
    assert (caller.tenant, caller.share("u"), caller.is_operator) == ("t", "t", False)
    assert access.caller(f"Bearer {secret_of('k')}") is caller
    access._keys = lambda: Keys()
    with pytest.raises(Unauthenticated):
        access.caller(f"Bearer {secret_of('k')}")
