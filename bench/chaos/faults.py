"""The faults of `make chaos`. Each acts on the running cluster, and returns once nothing more is done to it."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass

from bench.chaos.cluster import ChaosCluster
from bench.chaos.load import Load

STOPPED_SECONDS = 20.0
KILL_SECONDS = 15.0  # between two kills

Act = Callable[[ChaosCluster, Load], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Fault:
    """`act` does it. `may_cut`: connections of the killed gateway may end."""

    name: str
    act: Act
    may_cut: bool = False


def kill_worker(role: str) -> Act:
    async def act(cluster: ChaosCluster, load: Load) -> None:
        os.kill((await cluster.worker(role))["pid"], signal.SIGKILL)
        await cluster.wait_broken()

    return act


def kill_engine(role: str) -> Act:
    async def act(cluster: ChaosCluster, load: Load) -> None:
        os.kill((await cluster.worker(role))["engine_pids"][0], signal.SIGKILL)
        await cluster.wait_broken()

    return act


def stop_worker(role: str) -> Act:
    async def act(cluster: ChaosCluster, load: Load) -> None:
        await _stopped((await cluster.worker(role))["pid"])

    return act


def stop_engine(role: str) -> Act:
    """The engine's process stands still, and the worker goes on. The worker kills the engine in the end."""

    async def act(cluster: ChaosCluster, load: Load) -> None:
        await _stopped((await cluster.worker(role))["engine_pids"][0])

    return act


async def kill_gateway(cluster: ChaosCluster, load: Load) -> None:
    load.urls.remove(cluster.kill_gateway())
    cluster.start_gateway()
    load.urls[:] = cluster.gateways


async def kill_redis(cluster: ChaosCluster, load: Load) -> None:
    cluster.redis.kill()
    await asyncio.sleep(5.0)
    cluster.redis.start()


async def freeze_redis(cluster: ChaosCluster, load: Load) -> None:
    cluster.redis.freeze()
    await asyncio.sleep(STOPPED_SECONDS)
    cluster.redis.thaw()


async def empty_redis(cluster: ChaosCluster, load: Load) -> None:
    cluster.redis.empty()
    await asyncio.sleep(5.0)


def kill_often(minutes: float) -> Act:
    """A worker or engine of either role dies every KILL_SECONDS, while another worker of its role is ready."""

    async def act(cluster: ChaosCluster, load: Load) -> None:
        source, end = random.Random(0), time.monotonic() + 60 * minutes
        while time.monotonic() < end:
            workers = [one for one in await cluster.workers() if one["state"] == "ready"]
            roles = [one["role"] for one in workers]
            spare = [one for one in workers if roles.count(one["role"]) > 1]
            if spare:
                one = source.choice(spare)
                with suppress(ProcessLookupError):
                    os.kill(source.choice([one["pid"], one["engine_pids"][0]]), signal.SIGKILL)
            await asyncio.sleep(KILL_SECONDS)

    return act


async def _stopped(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)
    try:
        await asyncio.sleep(STOPPED_SECONDS)
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def faults(minutes: float) -> list[Fault]:
    """All faults. `minutes` is the length of the last one."""
    return [
        Fault("prefill worker killed", kill_worker("prefill")),
        Fault("decode worker killed", kill_worker("decode")),
        Fault("prefill engine killed", kill_engine("prefill")),
        Fault("decode engine killed", kill_engine("decode")),
        Fault("gateway killed", kill_gateway, may_cut=True),
        Fault("prefill worker stopped for 20 s", stop_worker("prefill")),
        Fault("decode worker stopped for 20 s", stop_worker("decode")),
        Fault("prefill engine stopped for 20 s", stop_engine("prefill")),
        Fault("decode engine stopped for 20 s", stop_engine("decode")),
        Fault("Redis killed for 5 s", kill_redis),
        Fault("Redis frozen for 20 s", freeze_redis),
        Fault("Redis emptied", empty_redis),
        Fault("a worker or engine killed every 15 s", kill_often(minutes)),
    ]
