"""`preft serve` with Ray and its real workers, over fake engines: `python -m support.fake_serve ARGUMENTS`."""

from __future__ import annotations

import sys

from preft.cli import main
from preft.cluster.ray_environment import set_ray_environment
from support.worker_servers import StartPaced


def serve(arguments: list[str]) -> int:
    set_ray_environment()

    from preft.cluster import ray_cluster

    class PacedActor(ray_cluster.WorkerActor):
        start_engine = StartPaced

    ray_cluster.WorkerActor = PacedActor  # type: ignore[misc]
    return main(["serve", *arguments])


if __name__ == "__main__":
    sys.exit(serve(sys.argv[1:]))
