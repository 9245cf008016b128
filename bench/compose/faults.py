"""The faults of `make test-compose`. Each acts on running containers, and returns once nothing more is done to them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from bench.chaos.load import Load
from bench.compose.engine import NETWORK_IMAGE
from bench.compose.stack import Stack
from preft.core.errors import PreftError

CUT_SECONDS = 10.0
DEAD_SECONDS = 10.0  # for which a killed container stays away
STOP_SECONDS = 45  # `stop_grace_period` of docker-compose.yml
NOTICED_SECONDS = 180.0  # for the gateways to see that a container's worker is gone

Act = Callable[[Stack, Load], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Fault:
    """`act` does it. `may_cut`: connections of the killed gateway may end."""

    name: str
    act: Act
    may_cut: bool = False


def kill(service: str) -> Act:
    """Kills the last container of the service, and starts it again."""

    async def act(stack: Stack, load: Load) -> None:
        container = stack.containers(service)[-1]
        await asyncio.to_thread(stack.engine.run, "kill", container)
        await stack.wait_whole(load.urls[0], whole=False, seconds=NOTICED_SECONDS)
        await asyncio.sleep(DEAD_SECONDS)
        await asyncio.to_thread(stack.engine.run, "start", container)

    return act


def stop(service: str) -> Act:
    """Stops the last container of the service in order, so that Ray drains its node, and starts it again."""

    async def act(stack: Stack, load: Load) -> None:
        container = stack.containers(service)[-1]
        await asyncio.to_thread(stack.engine.run, "stop", "--time", str(STOP_SECONDS), container)
        await stack.wait_whole(load.urls[0], whole=False, seconds=NOTICED_SECONDS)
        await asyncio.sleep(DEAD_SECONDS)
        await asyncio.to_thread(stack.engine.run, "start", container)

    return act


def kill_around(service: str) -> Act:
    """Kills the container of the service, without which all workers live on, and starts it again.

    Then kills a worker's process, which only a whole cluster starts again. Raises PreftError if another worker ends.
    """

    async def act(stack: Stack, load: Load) -> None:
        before = await stack.processes(load.urls[0])
        adopted = stack.adoptions()
        (container,) = stack.containers(service)
        await asyncio.to_thread(stack.engine.run, "kill", container)
        await asyncio.sleep(DEAD_SECONDS)
        await asyncio.to_thread(stack.engine.run, "start", container)
        end = time.monotonic() + NOTICED_SECONDS
        while service == "serve-cpu" and stack.adoptions() == adopted and time.monotonic() < end:
            await asyncio.sleep(1.0)
        after = await stack.processes(load.urls[0])
        if after != before or (service == "serve-cpu" and stack.adoptions() == adopted):
            raise PreftError(f"{service} was killed, and the workers weren't adopted: {before} became {after}")
        await _kill_worker(stack, load)

    return act


async def _kill_worker(stack: Stack, load: Load) -> None:
    """Kills the process of a decode worker alone."""
    worker = next(one for one in await stack.workers(load.urls[0]) if one["role"] == "decode")
    host = worker["address"].rpartition(":")[0]
    (container,) = (one for one in stack.containers("decode-cpu") if stack.address(one) == host)
    await asyncio.to_thread(stack.engine.run, "exec", container, "bash", "-c", f"kill -9 {worker['pid']}")
    await stack.wait_whole(load.urls[0], whole=False, seconds=NOTICED_SECONDS)


async def cut_network(stack: Stack, load: Load) -> None:
    """No packet passes between a prefill and a decode worker, while both reach all other processes."""
    prefills = [stack.address(one) for one in stack.containers("prefill-cpu")]
    decodes = stack.containers("decode-cpu")
    await asyncio.gather(*(_packets(stack, one, "--append", prefills) for one in decodes))
    try:
        await asyncio.sleep(CUT_SECONDS)
    finally:
        await asyncio.gather(*(_packets(stack, one, "--delete", prefills) for one in decodes))


async def _packets(stack: Stack, container: str, change: str, addresses: list[str]) -> None:
    """Begins or ends the loss of all packets between a container and `addresses`."""
    rules = [
        f"iptables --wait {change} {chain} {side} {address} --jump DROP"
        for address in addresses
        for chain, side in (("INPUT", "--source"), ("OUTPUT", "--destination"))
    ]
    flags = ["--rm", "--network", f"container:{container}", "--cap-add", "NET_ADMIN"]
    await asyncio.to_thread(stack.engine.run, "run", *flags, NETWORK_IMAGE, "sh", "-ec", "\n".join(rules))


def restart(service: str) -> Act:
    """Ends the service's container in order, and starts it again at once."""

    async def act(stack: Stack, load: Load) -> None:
        await asyncio.to_thread(stack.engine.run, "restart", stack.containers(service)[0])

    return act


async def kill_gateway(stack: Stack, load: Load) -> None:
    """Its clients go to the other gateway until it is back."""
    container = stack.containers("gateway-cpu")[-1]
    load.urls.remove(stack.url(container))
    await asyncio.to_thread(stack.engine.run, "kill", container)
    await asyncio.sleep(DEAD_SECONDS)
    await asyncio.to_thread(stack.engine.run, "start", container)
    await stack.wait_whole(stack.url(container))
    load.urls[:] = stack.gateways()
    if len(load.urls) < 2:
        raise PreftError("the killed gateway isn't back")


async def join_and_leave(stack: Stack, load: Load) -> None:
    """A decode worker of a further machine: another project, which has Ray's token and the network alone."""
    token = stack.engine.run("exec", stack.containers("head-cpu")[0], "cat", "/run/preft/ray_token")
    with _folder_with(token) as folder:
        try:
            await asyncio.to_thread(stack.node, folder, "up", "--detach", "--no-build", "decode-cpu")
            await stack.wait_whole(load.urls[0], further=1)
        finally:
            await asyncio.to_thread(stack.node, folder, "down", "--volumes")


@contextmanager
def _folder_with(token: str) -> Iterator[str]:
    """A folder of secrets that the containers' user can read."""
    with TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        Path(folder, "ray_token").write_text(token)
        yield folder


FAULTS = [
    Fault("decode container killed", kill("decode-cpu")),
    Fault("network between prefill and decode cut for 10 s", cut_network),
    Fault("Redis restarted", restart("redis")),
    Fault("gateway killed", kill_gateway, may_cut=True),
    Fault("prefill container killed", kill("prefill-cpu")),
    Fault("decode container stopped", stop("decode-cpu")),
    Fault("prefill container stopped", stop("prefill-cpu")),
    Fault("a machine joins and leaves", join_and_leave),
    Fault("preft serve killed", kill_around("serve-cpu")),
    Fault("tables of Ray restarted", restart("ray-tables")),
    Fault("head of Ray killed", kill_around("head-cpu")),
]
