"""The cluster's secret: made once, kept to its owner, and nowhere to be seen."""

from __future__ import annotations

import logging
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from preft.cli.settings_flags import overrides_from
from preft.cluster.secret import FILE, cluster_secret, read_secret
from preft.core.errors import ConfigError
from preft.core.settings import Settings, load_settings
from preft.rpc.secret import ClusterSecret

OWN = "written by an operator"


def settings_in(folder: Path, **changes: object) -> Settings:
    return load_settings(None, {"model": str(folder / "model"), "state_dir": str(folder / "state"), **changes})


def test_it_is_made_once_for_its_owner_alone(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        secrets = set(pool.map(lambda _: read_secret(settings_in(tmp_path)), range(16)))
    assert len(secrets) == 1
    assert len(secrets.pop()) == 64
    assert [path.name for path in (tmp_path / "state").iterdir()] == [FILE]
    assert stat.S_IMODE((tmp_path / "state" / FILE).stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o700


def test_each_machine_has_its_own(tmp_path: Path) -> None:
    assert read_secret(settings_in(tmp_path / "one")) != read_secret(settings_in(tmp_path / "other"))


def test_a_given_one_counts(tmp_path: Path) -> None:
    own = settings_in(tmp_path, cluster_secret=OWN)
    assert read_secret(own) == OWN
    assert not (tmp_path / "state").exists()
    with pytest.raises(ConfigError, match=r"^cluster_secret"):
        settings_in(tmp_path, cluster_secret="short")


def test_one_that_others_may_read_is_no_secret(tmp_path: Path) -> None:
    read_secret(settings_in(tmp_path))
    (tmp_path / "state" / FILE).chmod(0o640)
    with pytest.raises(ConfigError, match=r"^cluster_secret: other users may read"):
        read_secret(settings_in(tmp_path))


@pytest.mark.parametrize("content", [b"", b"   \n", b"short", b"\xff" * 64])
def test_a_file_that_holds_none_is_said(tmp_path: Path, content: bytes) -> None:
    read_secret(settings_in(tmp_path))
    (tmp_path / "state" / FILE).write_bytes(content)
    with pytest.raises(ConfigError, match=r"^cluster_secret: .*cluster_secret"):
        read_secret(settings_in(tmp_path))


def test_a_state_folder_that_is_none_is_said(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("no folder")
    with pytest.raises(ConfigError, match=r"^cluster_secret: .*can't be used"):
        read_secret(settings_in(tmp_path))


def test_it_is_shown_nowhere(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    own = settings_in(tmp_path, cluster_secret=OWN)
    shown = [own.model_dump_json(), repr(own), str(own), str(own.model_dump()), repr(cluster_secret(own)), caplog.text]
    assert not any(OWN in text for text in shown)
    assert Settings.model_validate_json(own.model_dump_json()).cluster_secret is None  # not the stars of a hidden one


def test_flags_can_not_carry_it() -> None:
    """Every user of the machine may read them."""
    from argparse import Namespace

    with pytest.raises(ConfigError, match=r"^cluster_secret: .*--config file.* cluster_secret_file$"):
        overrides_from(Namespace(set=[("cluster_secret", OWN)]))


def test_codes_are_for_one_address_and_one_secret() -> None:
    one, other = ClusterSecret(OWN), ClusterSecret(OWN + "!")
    codes = [one.call_code("h:1"), one.call_code("h:2"), other.call_code("h:1"), one.proof("h:1"), one.proof("h:2")]
    assert len(set(codes)) == 5
    assert one.call_code("h:1") == ClusterSecret(OWN).call_code("h:1")
    assert not any(OWN in code for code in codes)
