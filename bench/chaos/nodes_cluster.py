"""The cluster of the dead node: `preft serve` on a Ray cluster of a head and two nodes, all on this machine.

Each node has room for a prefill and a decode worker, so no worker can move to the other node.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from bench.chaos.cluster import ADAPTERS, ChaosCluster, mark_children, write_settings
from bench.redis_server import RedisServer, running_redis
from preft.cluster.ray_folder import new_ray_folder
from preft.core.errors import PreftError
from preft_loadgen.child import bound

HEAD = "127.0.0.2"  # Ray would replace 127.0.0.1 by the machine's outside address
NODES = ("127.0.0.3", "127.0.0.4")
RAYLET_SECONDS = 60.0


class RayNodes:
    """Ray's own processes. Each node ends with this object."""

    def __init__(self, folder: Path) -> None:
        with socket.create_server((HEAD, 0)) as free:
            port = free.getsockname()[1]
        self.address = f"{HEAD}:{port}"
        self._folder = folder
        self._nodes: dict[str, subprocess.Popen[bytes]] = {}
        self._temporary: list[Path] = []
        self._start(HEAD, "--head", "--port", str(port), "--include-dashboard=false", "--num-cpus=0")

    def add(self, host: str) -> None:
        resources = json.dumps({"prefill": 1, "decode": 1})
        self._start(host, "--address", self.address, "--num-cpus=1", f"--resources={resources}")

    def kill_raylet(self, host: str) -> None:
        """Kills the node's raylet alone, and waits until Ray has ended the node. Raises PreftError if there is none."""
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                command = (process / "cmdline").read_bytes().split(b"\0")
                if command[0].endswith(b"/raylet") and f"--node_ip_address={host}".encode() in command:
                    os.kill(int(process.name), signal.SIGKILL)
                    self._nodes.pop(host).wait(RAYLET_SECONDS)
                    return
        raise PreftError(f"no raylet runs at {host}")

    def close(self) -> None:
        for node in reversed(self._nodes.values()):
            with suppress(ProcessLookupError):
                os.killpg(node.pid, signal.SIGKILL)
            node.wait()
        for folder in self._temporary:
            shutil.rmtree(folder, ignore_errors=True)

    def _start(self, host: str, *arguments: str) -> None:
        folder = new_ray_folder()
        self._temporary.append(folder)
        command = [str(Path(sys.executable).with_name("ray")), "start", "--block", f"--node-ip-address={host}"]
        command += [f"--temp-dir={folder}", "--object-store-memory=80000000", "--disable-usage-stats", *arguments]
        with (self._folder / f"ray-{host}-{time.monotonic_ns()}.log").open("wb") as log:
            self._nodes[host] = subprocess.Popen(
                bound(command), stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )


class NodesCluster(ChaosCluster):
    """Two nodes, `NODES`, with a worker of each role."""

    def __init__(self, redis: RedisServer, config: Path, folder: Path, nodes: RayNodes) -> None:
        super().__init__(redis, redis.url, config, folder)
        self.nodes = nodes


@asynccontextmanager
async def nodes_cluster(folder: Path) -> AsyncIterator[NodesCluster]:
    """Starts everything in `folder`, and ends it with the context. Raises PreftError or LoadgenError."""
    os.environ["RAY_AUTH_MODE"] = "disabled"
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - Ray's 15 starves engines on a busy machine
    os.environ["RAY_raylet_start_wait_time_s"] = "120"  # noqa: SIM112 - 30 by default
    mark = mark_children()
    nodes = RayNodes(folder)
    try:
        for host in NODES:
            nodes.add(host)
        roles = {role: {"resources": {role: 1}} for role in ("prefill", "decode")}
        config = write_settings(folder, ADAPTERS, ray_address=nodes.address, **roles)
        with running_redis(folder / "redis") as redis:
            cluster = NodesCluster(redis, config, folder, nodes)
            cluster.mark = mark
            try:
                cluster.start_server(())
                cluster.start_server()
                await cluster.wait_whole()
                yield cluster
            finally:
                cluster.close()
    finally:
        nodes.close()
