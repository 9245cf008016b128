"""Faults of workers, engines, gateways, Redis and the disk. Each returns once nothing more is done to the cluster."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import aiohttp

from bench.chaos.cluster import EXAMPLE, ChaosCluster
from bench.chaos.load import Load
from bench.chaos.ray_cluster import RayCluster
from preft.core.errors import PreftError

STOPPED_SECONDS = 20.0
KILL_SECONDS = 15.0  # between two kills
FULL_SECONDS = 15.0

Act = Callable[[Any, Load], Awaitable[dict[str, Any] | None]]
"""Gets the cluster of the fault's site. Returns facts for the results, if there are any."""


class Site(StrEnum):
    """The kinds of clusters; see `ray_cluster`, `network_cluster` and `nodes_cluster`."""

    RAY = "ray"
    NETWORK = "network"
    NODES = "nodes"


@dataclass(frozen=True, slots=True)
class Fault:
    """`act` does it. `may_cut`: connections of the killed gateway may end. `brings_load`: `act` sends all requests.

    `unless` says why the fault can't be tried here, or None.
    """

    name: str
    act: Act
    site: Site = Site.RAY
    may_cut: bool = False
    brings_load: bool = False
    unless: Callable[[], str | None] = lambda: None


def kill_worker(role: str) -> Act:
    async def act(cluster: RayCluster, load: Load) -> None:
        os.kill((await cluster.worker(role))["pid"], signal.SIGKILL)
        await cluster.wait_broken()

    return act


def kill_engine(role: str) -> Act:
    async def act(cluster: RayCluster, load: Load) -> None:
        os.kill((await cluster.worker(role))["engine_pids"][0], signal.SIGKILL)
        await cluster.wait_broken()

    return act


def stop_worker(role: str) -> Act:
    async def act(cluster: RayCluster, load: Load) -> None:
        await _stopped((await cluster.worker(role))["pid"])

    return act


def stop_engine(role: str) -> Act:
    """The engine's process stands still, and the worker goes on. The worker kills the engine in the end."""

    async def act(cluster: RayCluster, load: Load) -> None:
        await _stopped((await cluster.worker(role))["engine_pids"][0])

    return act


async def kill_gateway(cluster: RayCluster, load: Load) -> None:
    load.urls.remove(cluster.kill_gateway())
    cluster.start_server()
    load.urls[:] = cluster.gateways


async def kill_redis(cluster: RayCluster, load: Load) -> None:
    cluster.redis.kill()
    await asyncio.sleep(5.0)
    cluster.redis.start()


async def freeze_redis(cluster: RayCluster, load: Load) -> None:
    cluster.redis.freeze()
    await asyncio.sleep(STOPPED_SECONDS)
    cluster.redis.thaw()


async def empty_redis(cluster: RayCluster, load: Load) -> None:
    cluster.redis.empty()
    await asyncio.sleep(5.0)


def kill_all(role: str) -> Act:
    """All workers of the role die at once: requests wait for their restart."""

    async def act(cluster: RayCluster, load: Load) -> None:
        for one in await cluster.ready_workers(role):
            os.kill(one["pid"], signal.SIGKILL)
        await cluster.wait_broken()

    return act


def kill_often(minutes: float) -> Act:
    """A worker or engine of either role dies every KILL_SECONDS, while another worker of its role is ready."""

    async def act(cluster: RayCluster, load: Load) -> dict[str, Any]:
        kills = [0]
        with suppress(TimeoutError):
            async with asyncio.timeout(60 * minutes):
                await kill_spares(cluster, kills)
        return {"kills": kills[0]}

    return act


async def kill_spares(cluster: ChaosCluster, kills: list[int] | None = None) -> None:
    """Kills a worker or engine every KILL_SECONDS if another of its role is ready, until it is cancelled."""
    source = random.Random(0)
    while True:
        workers = [one for one in await cluster.workers() if one["state"] == "ready"]
        roles = [one["role"] for one in workers]
        spare = [one for one in workers if roles.count(one["role"]) > 1]
        if spare:
            one = source.choice(spare)
            with suppress(ProcessLookupError):
                os.kill(source.choice([one["pid"], one["engine_pids"][0]]), signal.SIGKILL)
            if kills is not None:
                kills[0] += 1
        await asyncio.sleep(KILL_SECONDS)


async def fill_disk(cluster: RayCluster, load: Load) -> dict[str, Any]:
    """The disk of the adapter copies is full for a while. Meanwhile a new adapter is refused, and then it is added.

    Raises PreftError if the new adapter is taken while there is no room for it, or isn't afterwards.
    """
    assert cluster.disk is not None
    filler = cluster.disk / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(4096)):
            pass
    try:
        end = time.monotonic() + FULL_SECONDS
        refused = await _add(load.next_url, "more", EXAMPLE / "adapters" / "emil")
        if refused[0] != 503:
            raise PreftError(f"a full disk should be a 503: {refused}")
        await asyncio.sleep(end - time.monotonic())
    finally:
        filler.unlink()
    added = await _add(load.next_url, "more", EXAMPLE / "adapters" / "emil")
    if added[0] != 200:
        raise PreftError(f"there is room again, and the adapter isn't added: {added}")
    async with aiohttp.ClientSession() as session, session.delete(f"{load.next_url}/v1/adapters/more") as reply:
        await reply.read()
    return {"refused_with": refused[1]}


async def _add(url: str, name: str, source: Path) -> tuple[int, str]:
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{url}/v1/adapters", json={"name": name, "source": str(source)}) as reply,
    ):
        return reply.status, (await reply.text())[:300]


def no_mounts() -> str | None:
    return None if os.geteuid() == 0 else "a full disk needs root, to mount a small one"


async def _stopped(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)
    try:
        await asyncio.sleep(STOPPED_SECONDS)
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def ray_faults(minutes: float) -> list[Fault]:
    """`minutes` is the length of the last one."""
    return [
        Fault("prefill worker killed", kill_worker("prefill")),
        Fault("decode worker killed", kill_worker("decode")),
        Fault("prefill engine killed", kill_engine("prefill")),
        Fault("decode engine killed", kill_engine("decode")),
        Fault("all prefill workers killed", kill_all("prefill")),
        Fault("all decode workers killed", kill_all("decode")),
        Fault("gateway killed", kill_gateway, may_cut=True),
        Fault("prefill worker stopped for 20 s", stop_worker("prefill")),
        Fault("decode worker stopped for 20 s", stop_worker("decode")),
        Fault("prefill engine stopped for 20 s", stop_engine("prefill")),
        Fault("decode engine stopped for 20 s", stop_engine("decode")),
        Fault("Redis killed for 5 s", kill_redis),
        Fault("Redis frozen for 20 s", freeze_redis),
        Fault("Redis emptied", empty_redis),
        Fault("disk of the adapter copies full for 15 s", fill_disk, unless=no_mounts),
        Fault("a worker or engine killed every 15 s", kill_often(minutes)),
    ]
