"""The cluster of most faults: `preft serve` with its workers under Ray on this machine, and a second gateway.

The disk of the adapter copies is a small one of its own if the process may mount it (root).
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from bench.chaos.cluster import ADAPTERS, ChaosCluster, mark_children, write_settings
from bench.redis_server import running_redis
from preft.core.errors import PreftError
from preft_loadgen.served import ServeFailed

COLD = ("goran", "hana", "chen", "dalia", "goran-loreft", "hana-loreft", "goran-direft", "hana-direft")
DISK = "16m"  # for adapter copies, which are 2 MB


class RayCluster(ChaosCluster):
    """`disk` is the small file system of the adapter copies; None if it couldn't be mounted."""

    disk: Path | None = None

    def kill_gateway(self) -> str:
        """Kills the second gateway; returns its URL."""
        url = self.gateways[-1]
        if len(self.gateways) < 2:
            raise PreftError("there is no second gateway")
        server, stack = self.forget_server(url)
        os.kill(server.pid, signal.SIGKILL)
        with suppress(ServeFailed):  # that it was killed
            stack.close()
        return url

    def mount_disk(self) -> None:
        folder = self.state_dir / "adapters"
        folder.mkdir(parents=True)
        if _ran("mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(folder)):
            self.disk = folder

    def close(self) -> None:
        try:
            super().close()
        finally:
            if self.disk is not None:
                _ran("umount", "--lazy", str(self.disk))


def _ran(*command: str) -> bool:
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@asynccontextmanager
async def ray_cluster(folder: Path, at_ready: Callable[[str], Awaitable[None]]) -> AsyncIterator[RayCluster]:
    """Starts everything in `folder`, and ends it with the context. Raises PreftError or LoadgenError.

    `at_ready` gets the first gateway's URL in the moment in which it is ready. Then all others are started.
    """
    mark = mark_children()
    config = write_settings(folder, (*ADAPTERS, *COLD))
    with running_redis(folder / "redis") as redis:
        cluster = RayCluster(redis, redis.url, config, folder)
        cluster.mark = mark
        try:
            cluster.mount_disk()
            await at_ready(cluster.start_server(()))
            cluster.start_server()
            await cluster.wait_whole()
            yield cluster
        finally:
            cluster.close()
