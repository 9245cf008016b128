"""The cluster of the network faults: `preft worker` processes in network namespaces, and two `preft gateway`.

A worker that ends is started again at once, as systemd would do it.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from bench.chaos.cluster import ADAPTERS, EACH, LOOK_SECONDS, ChaosCluster, mark_children, write_settings
from bench.chaos.namespaces import Namespace, Network
from bench.chaos.wrong_clock import clock_ahead
from bench.redis_server import RedisServer, running_redis
from preft_loadgen.child import bound

STOP_SECONDS = 60.0


@dataclass(slots=True)
class Place:
    """Where a worker runs. `clock_ahead` is in seconds, for the next process."""

    role: str
    space: Namespace
    clock_ahead: int = 0
    process: subprocess.Popen[bytes] | None = None
    starts: int = field(default=0)


class NetworkCluster(ChaosCluster):
    """`places` are the prefill workers', then the decode workers', in the order of `network.links`."""

    def __init__(self, redis: RedisServer, config: Path, folder: Path, network: Network) -> None:
        super().__init__(redis, redis.socket_url, config, folder)
        self.network = network
        self.supervisor: asyncio.Task[None] | None = None
        self.places = [Place("prefill", network.prefill) for _ in range(EACH)]
        self.places += [Place("decode", space) for space in network.decode]

    async def whole(self) -> bool:
        if self.supervisor is not None and self.supervisor.done():
            self.supervisor.result()  # raises its error: no worker comes back any more
        return await super().whole()

    def keep_running(self) -> None:
        """Starts each worker that doesn't run."""
        for number, place in enumerate(self.places):
            if place.process is None or place.process.poll() is not None:
                place.starts += 1
                log = self.folder / f"worker-{number}-{place.starts}.log"
                place.process = self._start(place, log)

    def stop(self, place: Place) -> None:
        """Ends the worker in order; `keep_running` starts another one."""
        assert place.process is not None
        place.process.send_signal(signal.SIGTERM)

    def pid_of(self, place: Place) -> int:
        assert place.process is not None
        return place.process.pid

    def close(self) -> None:
        super().close()
        running = [place.process for place in self.places if place.process is not None]
        for process in running:
            process.send_signal(signal.SIGTERM)
        for process in running:
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _start(self, place: Place, log: Path) -> subprocess.Popen[bytes]:
        worker = [sys.executable, "-m", "preft.cli", "worker", "--role", place.role, "--host", place.space.host]
        worker += ["--config", str(self.config), "--state", self.state, "--state-dir", str(self.state_dir)]
        environment = dict(os.environ)
        if place.clock_ahead:
            environment |= clock_ahead(place.clock_ahead, self.folder)
        with log.open("wb") as output:
            command = bound(place.space.command(*worker))
            return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)


@asynccontextmanager
async def network_cluster(folder: Path) -> AsyncIterator[NetworkCluster]:
    """Starts everything in `folder`, and ends it with the context. Raises PreftError or LoadgenError."""
    mark = mark_children()
    network = Network(EACH)
    try:
        with running_redis(folder / "redis") as redis:
            config = write_settings(folder, ADAPTERS, insecure=True)
            cluster = NetworkCluster(redis, config, folder, network)
            cluster.mark = mark
            try:
                cluster.keep_running()
                cluster.supervisor = asyncio.create_task(_supervise(cluster))
                for _ in range(2):
                    cluster.start_server()
                await cluster.wait_whole()
                yield cluster
            finally:
                if cluster.supervisor is not None:
                    cluster.supervisor.cancel()
                    await asyncio.gather(cluster.supervisor, return_exceptions=True)
                cluster.close()
    finally:
        network.close()


async def _supervise(cluster: NetworkCluster) -> None:
    while True:
        cluster.keep_running()
        await asyncio.sleep(LOOK_SECONDS)
