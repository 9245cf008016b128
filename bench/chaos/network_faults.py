"""Faults of the network between prefill and decode workers, of clocks, and of a whole node."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from typing import Any

from bench.chaos import wrong_clock
from bench.chaos.faults import Act, Fault, Site
from bench.chaos.load import Load
from bench.chaos.namespaces import missing
from bench.chaos.network_cluster import NetworkCluster
from bench.chaos.nodes_cluster import NODES, NodesCluster
from preft.core.errors import PreftError

CUT_SECONDS = 10.0
BAD_SECONDS = 30.0  # of a slow or lossy network
SLOW_RATE, SLOWEST_RATE = 1_000_000, 100_000  # bytes per second
LOSS = 0.05
CLOCK_AHEAD = 600  # seconds
AHEAD_SECONDS = 30.0
DOWN_SECONDS = 5.0  # until a dead node is started again


async def cut(cluster: NetworkCluster, load: Load) -> None:
    await _worse(cluster, lambda link: link.lose(1.0), CUT_SECONDS)


async def slow(cluster: NetworkCluster, load: Load) -> None:
    await _worse(cluster, lambda link: link.slow_down(SLOW_RATE), BAD_SECONDS)


async def lossy(cluster: NetworkCluster, load: Load) -> None:
    await _worse(cluster, lambda link: link.lose(LOSS), BAD_SECONDS)


async def _worse(cluster: NetworkCluster, spoil: Any, seconds: float) -> None:
    """All links between prefill and decode workers."""
    try:
        for link in cluster.network.links:
            spoil(link)
        await asyncio.sleep(seconds)
    finally:
        for link in cluster.network.links:
            link.heal()


async def kill_receiver(cluster: NetworkCluster, load: Load) -> dict[str, Any]:
    """A decode worker dies while KV is on the way to it. Raises PreftError if there never is any."""
    link, place = cluster.network.links[0], cluster.places[2]
    link.slow_down(SLOWEST_RATE)
    try:
        end = time.monotonic() + BAD_SECONDS
        while (under_way := link.under_way()) < SLOWEST_RATE // 4:
            if time.monotonic() > end:
                raise PreftError("no KV is on its way to the decode worker")
            await asyncio.sleep(0.01)
        os.kill(cluster.pid_of(place), signal.SIGKILL)
        await cluster.wait_broken()
    finally:
        link.heal()
    return {"bytes_on_the_way": under_way}


async def clock_ahead(cluster: NetworkCluster, load: Load) -> None:
    """A prefill and a decode worker are replaced by ones whose clocks are ahead, and those by right ones again."""
    places = (cluster.places[0], cluster.places[2])
    for seconds in (CLOCK_AHEAD, 0):
        for place in places:
            place.clock_ahead = seconds
            cluster.stop(place)
        await cluster.wait_broken()
        await cluster.wait_whole()
        if seconds:
            await asyncio.sleep(AHEAD_SECONDS)


def no_wrong_clock() -> str | None:
    return missing() or wrong_clock.missing()


async def kill_raylet(cluster: NodesCluster, load: Load) -> None:
    """A node's raylet dies, and its workers with it. Another raylet starts there a little later."""
    host = NODES[1]
    await asyncio.to_thread(cluster.nodes.kill_raylet, host)
    await cluster.wait_broken()
    await asyncio.sleep(DOWN_SECONDS)
    cluster.nodes.add(host)


def _network(name: str, act: Act) -> Fault:
    return Fault(name, act, Site.NETWORK, unless=missing)


def site_faults() -> list[Fault]:
    """Those that need a cluster of their own."""
    return [
        _network("network between prefill and decode cut for 10 s", cut),
        _network("network between prefill and decode at 1 MB/s for 30 s", slow),
        _network("network between prefill and decode loses 5% for 30 s", lossy),
        _network("KV receiver killed in the middle of a transfer", kill_receiver),
        Fault("clocks of a prefill and a decode worker 10 min ahead", clock_ahead, Site.NETWORK, unless=no_wrong_clock),
        Fault("raylet of a node killed", kill_raylet, Site.NODES),
    ]
