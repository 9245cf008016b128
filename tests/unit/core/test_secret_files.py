"""Secrets come from files too, one newline at the end doesn't count, and no message shows them."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

import pytest

from preft.core.environment import read_environment
from preft.core.errors import ConfigError
from preft.core.settings import Settings, load_settings

SECRET = "written by an operator"
URL = "redis://ann:hidden@store:6379/0"


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "secret").write_text(f"{SECRET}\n")
    (tmp_path / "url").write_text(URL)
    return {"cluster_secret_file": str(tmp_path / "secret"), "state_file": str(tmp_path / "url")}


def secrets_of(settings: Settings) -> tuple[str | None, str | None]:
    given = (settings.cluster_secret, settings.state)
    return given[0] and given[0].get_secret_value(), given[1] and given[1].get_secret_value()


def test_as_settings_and_as_variables(files: dict[str, str]) -> None:
    assert secrets_of(load_settings(None, {"model": "/m", **files})) == (SECRET, URL)
    environ = {f"PREFT_{name.upper()}": path for name, path in files.items()}
    assert secrets_of(load_settings(None, {"model": "/m"}, read_environment(environ))) == (SECRET, URL)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"sixteen letters!", "sixteen letters!"),
        (b"sixteen letters!\n", "sixteen letters!"),
        (b"sixteen letters!\r\n", "sixteen letters!"),
        (b" sixteen letters! ", " sixteen letters! "),
    ],
)
def test_one_newline_at_the_end_does_not_count(tmp_path: Path, content: bytes, expected: str) -> None:
    (tmp_path / "s").write_bytes(content)
    assert secrets_of(load_settings(None, {"model": "/m", "cluster_secret_file": str(tmp_path / "s")}))[0] == expected


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "must hold cluster_secret in one line"),
        (b"\n", "must hold cluster_secret in one line"),
        (b"a secret of two\nlines of text", "must hold cluster_secret in one line"),
        (b"a secret with two newlines\n\n", "must hold cluster_secret in one line"),
        (b"x" * 5000, "must hold cluster_secret in one line of at most 4096 bytes"),
        (b"secret letters \xff\xfe", "is not UTF-8 text"),
        (None, "can't be read: No such file or directory"),
    ],
)
def test_a_file_that_holds_none(tmp_path: Path, content: bytes | None, reason: str) -> None:
    if content is not None:
        (tmp_path / "s").write_bytes(content)
    with pytest.raises(ConfigError) as said:
        load_settings(None, {"model": "/m", "cluster_secret_file": str(tmp_path / "s")})
    assert str(said.value).startswith(f"cluster_secret_file: {tmp_path / 's'} {reason}")
    assert "secret letters" not in "".join(traceback.format_exception(said.value))


@pytest.mark.parametrize("path", ["/proc/self/mem", "/", 5, ["/x"], ""])
def test_a_path_that_is_none(path: Any) -> None:
    with pytest.raises(ConfigError, match=r"^state_file: "):
        load_settings(None, {"model": "/m", "state_file": path})


def test_both_forms_at_once_are_a_mistake(files: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"^cluster_secret: cluster_secret_file is set too: set only one of them$"):
        load_settings(None, {"model": "/m", "cluster_secret": SECRET, **files})


def test_both_variables_at_once_are_a_mistake(files: dict[str, str]) -> None:
    environ = {"PREFT_STATE": "/s", "PREFT_STATE_FILE": files["state_file"]}
    with pytest.raises(ConfigError, match=r"^state: state_file is set too: set only one of them$"):
        load_settings(None, {"model": "/m"}, read_environment(environ))


def test_the_higher_layer_s_form_counts(files: dict[str, str], tmp_path: Path) -> None:
    config = tmp_path / "cluster.yaml"
    config.write_text(f"model: /m\ncluster_secret: of the settings file\nstate_file: {files['state_file']}\n")
    environ = {"PREFT_CLUSTER_SECRET_FILE": files["cluster_secret_file"], "PREFT_STATE": "/s.sqlite"}
    assert secrets_of(load_settings(config)) == ("of the settings file", URL)
    assert secrets_of(load_settings(config, None, read_environment(environ))) == (SECRET, "/s.sqlite")
    assert secrets_of(load_settings(config, {"state": "/t.sqlite"})) == ("of the settings file", "/t.sqlite")
    assert secrets_of(load_settings(config, {"cluster_secret_file": None})) == ("of the settings file", URL)
    assert secrets_of(load_settings(None, {"model": "/m", "state_file": None, "state": "/t"})) == (None, "/t")


def test_nothing_shows_them(files: dict[str, str]) -> None:
    settings = load_settings(None, {"model": "/m", **files})
    shown = repr(settings) + str(settings) + settings.model_dump_json() + str(settings.model_dump())
    assert SECRET not in shown
    assert "hidden" not in shown
    sent = Settings.model_validate_json(settings.model_dump_json())
    assert (sent.cluster_secret_file, sent.state_file) == (None, None)  # another machine has other files


@pytest.mark.parametrize("given", [{"cluster_secret": "hidden"}, {"cluster_secret": ["hidden"]}, {"state": ["hidden"]}])
def test_no_traceback_shows_a_wrong_one(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as said:
        load_settings(None, {"model": "/m", **given})
    assert "hidden" not in "".join(traceback.format_exception(said.value))


@pytest.mark.parametrize(
    "line",
    [
        '"hidden',
        "*hidden",
        "!hidden x",
        "{hidden",
        "@hidden",
        "hidden: hidden",
        "&hidden x\nb: *c",
        "\thidden\n- hidden",
    ],
)
def test_no_error_about_a_file_shows_its_lines(tmp_path: Path, line: str) -> None:
    config = tmp_path / "cluster.yaml"
    config.write_text(f"model: /m\ncluster_secret: {line}\n")
    with pytest.raises(ConfigError, match=rf"^{config} is not valid YAML: line [234], column ") as said:
        load_settings(config)
    assert "hidden" not in "".join(traceback.format_exception(said.value))


def test_a_short_one_is_said() -> None:
    with pytest.raises(ConfigError, match=r"^cluster_secret: a secret has 16 characters or more$"):
        load_settings(None, {"model": "/m", "cluster_secret": "of 15 letters.."})
