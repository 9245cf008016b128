"""The settings files in deploy/examples: each is read as `preft serve` reads it."""

from __future__ import annotations

from pathlib import Path

import pytest

from preft.core.errors import ConfigError
from preft.core.settings import GiB, Settings
from support.deployed_settings import read_deployed
from support.monitored import DEPLOY

EXAMPLES = DEPLOY / "examples"


def read(name: str, folder: Path) -> Settings:
    return read_deployed(EXAMPLES / f"{name}.yaml", folder)


def test_each_file_is_what_its_name_says(tmp_path: Path) -> None:
    assert {path.stem for path in EXAMPLES.iterdir()} == {"one-gpu", "1p1d", "2p6d-two-nodes", "70b"}
    assert read("one-gpu", tmp_path).colocated
    sizes = {name: read(name, tmp_path) for name in ("1p1d", "2p6d-two-nodes", "70b")}
    assert {name: (one.prefill.replicas, one.decode.replicas) for name, one in sizes.items()} == {
        "1p1d": (1, 1),
        "2p6d-two-nodes": (2, 6),
        "70b": (2, 6),
    }


def test_two_nodes_meet_in_redis_and_over_tls(tmp_path: Path) -> None:
    settings = read("2p6d-two-nodes", tmp_path)
    assert settings.ray_address is not None
    assert settings.state is not None
    assert settings.state.get_secret_value().startswith("rediss://")
    settings.check_internal_host("10.0.0.2")
    settings.check_public_host()
    text = (EXAMPLES / "2p6d-two-nodes.yaml").read_text()
    for role in settings.roles:
        ((name, need),) = settings.engine(role).resources.items()
        rooms = text.count(f'"{name}": {settings.engine(role).replicas // 2}')
        assert (rooms, need) == (2, 1)


def test_staging_memory_holds_four_prompts(tmp_path: Path) -> None:
    settings = read("70b", tmp_path)
    prompt = 2 * 80 * 8 * 128 * 2 * (settings.max_model_len or 0)  # Llama 3.3 70B, 16-bit KV
    assert 4 * prompt == 20 * GiB
    assert min(settings.prefill.staging_bytes or 0, settings.decode.staging_bytes or 0) > 4 * prompt


def test_an_unknown_name_fails(tmp_path: Path) -> None:
    changed = tmp_path / "changed.yaml"
    changed.write_text((EXAMPLES / "1p1d.yaml").read_text().replace("max_num_seqs", "max_num_sequences"))
    with pytest.raises(ConfigError, match=r"decode\.max_num_sequences: there is no such setting"):
        read_deployed(changed, tmp_path)
