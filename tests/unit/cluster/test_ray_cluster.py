"""The machines of a Ray cluster that exists already."""

from __future__ import annotations

from pathlib import Path

import pytest
import ray

from preft.cluster.ray_cluster import RayCluster
from preft.core.errors import ConfigError
from support.worker_servers import settings_for


def nodes_of(*machines: tuple[str, bool]) -> list[dict[str, object]]:
    return [{"NodeManagerAddress": address, "Alive": alive} for address, alive in machines]


@pytest.mark.parametrize(
    ("insecure", "says"),
    [(False, r"^tls: other machines reach 10\.0\.0\.7, "), (True, "^state: Ray at h:1 has several nodes")],
)
def test_workers_on_machines_that_others_reach_need_tls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, insecure: bool, says: str
) -> None:
    monkeypatch.setattr(ray, "init", lambda **_: None)
    monkeypatch.setattr(ray, "nodes", lambda: nodes_of(("127.0.0.1", True), ("10.9.9.9", False), ("10.0.0.7", True)))
    cluster = RayCluster(settings_for(tmp_path, ray_address="h:1", insecure=insecure), "c", tmp_path, print)
    with pytest.raises(ConfigError, match=says):
        cluster.start()
