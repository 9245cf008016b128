"""What makes workers those of one cluster, and what makes them outdated. tests/integration has Ray itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from preft.cluster import ray_cluster
from preft.cluster.ray_cluster import RayCluster
from preft.cluster.ray_workers import namespace_of, start_digest
from preft.core.cluster import Role
from preft.core.errors import ConfigError
from support.lora_folders import write_base
from support.worker_servers import settings_for

REDIS = "redis://:first@h:1/0"


def test_one_namespace_per_model_and_store(tmp_path: Path) -> None:
    """Without a shared store, or with a Ray of its own, `preft serve` takes its workers with it."""

    def namespace(**given: Any) -> str | None:
        return namespace_of(settings_for(tmp_path, **given))

    first = namespace(ray_address="h:1", state=REDIS)
    assert first == namespace(ray_address="g:2", state="redis://:second@h:1/0", port=7)
    assert first != namespace(ray_address="h:1", state="redis://:first@h:1/1")
    assert namespace(ray_address="h:1") is namespace(state=REDIS) is None
    (write_base(tmp_path / "other") / "config.json").write_text('{"num_hidden_layers": 1}')
    assert first != namespace(ray_address="h:1", state=REDIS, model=str(tmp_path / "other"))


@pytest.mark.parametrize(
    ("changes", "outdated"),
    [
        ({}, ()),
        ({"port": 7, "router": {"max_queue": 3}, "scaling": {"target": 0.5}}, ()),
        ({"decode": {"max_num_seqs": 9}}, (Role.DECODE,)),
        ({"prefill": {"replicas": 2, "max_replicas": 3}, "decode": {"replicas": 4}}, ()),
        ({"router": {"transfer_timeout": 9}}, (Role.PREFILL, Role.DECODE)),
        ({"adapters": {"one": "/tmp/one"}}, (Role.PREFILL, Role.DECODE)),
        ({"state": "redis://:second@h:1/0"}, (Role.PREFILL, Role.DECODE)),
    ],
)
def test_workers_are_outdated_if_new_ones_would_differ(
    tmp_path: Path, changes: dict[str, Any], outdated: tuple[Role, ...]
) -> None:
    given: dict[str, Any] = {"state": REDIS, "prefill": {}, "decode": {}}
    old, new = settings_for(tmp_path, **given), settings_for(tmp_path, **(given | changes))
    differ = [role for role in old.roles if start_digest(old, "secret", role) != start_digest(new, "secret", role)]
    assert differ == list(outdated)
    assert start_digest(old, "secret", Role.DECODE) != start_digest(old, "other", Role.DECODE)


def test_a_second_server_ends_with_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And touches no worker of the first one."""
    monkeypatch.setattr(ray_cluster, "OTHER_SECONDS", 0.05)
    monkeypatch.setattr(ray_cluster, "REPLY_SECONDS", 0.01)
    monkeypatch.setattr(ray_cluster, "other_server", lambda namespace: "process 5 on h")
    monkeypatch.setattr(ray_cluster, "find_workers", lambda namespace: pytest.fail("it adopts workers"))
    monkeypatch.setattr(RayCluster, "_join", lambda self, address: None)
    told: list[str] = []
    cluster = RayCluster(settings_for(tmp_path, ray_address="h:1", state=REDIS), "c", tmp_path, told.append)
    with pytest.raises(ConfigError, match=r"^ray_address: another `preft serve` \(process 5 on h\) has the workers"):
        cluster.start()
    assert told == ["waiting for the end of another `preft serve` (process 5 on h)"]
    assert cluster.members(Role.PREFILL, Role.DECODE) == []
