"""`preft serve` with Ray and its real workers, over fake engines: `python -m support.fake_serve ARGUMENTS`."""

from __future__ import annotations

import sys
from typing import Any

from preft.cli import main
from preft.cluster import serve as server
from support.worker_servers import StartPaced


def serve(arguments: list[str]) -> int:
    start = server._serve_with_workers

    async def start_with_fake_engines(*given: Any) -> None:
        from preft.cluster import ray_cluster  # imports Ray, which reads the environment that the server has prepared

        class PacedActor(ray_cluster.WorkerActor):
            start_engine = StartPaced

        ray_cluster.WorkerActor = PacedActor  # type: ignore[misc]
        await start(*given)

    server._serve_with_workers = start_with_fake_engines
    return main(["serve", *arguments])


if __name__ == "__main__":
    sys.exit(serve(sys.argv[1:]))
