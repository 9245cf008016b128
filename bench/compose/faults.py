"""The faults of `make test-compose`. Each acts on running containers, and returns once nothing more is done to them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from bench.chaos.load import Load
from bench.compose.engine import NETWORK_IMAGE
from bench.compose.stack import Stack, wait_whole
from preft.core.errors import PreftError

CUT_SECONDS = 10.0
DEAD_SECONDS = 10.0  # for which a killed container stays away
NOTICED_SECONDS = 180.0  # nodes of Ray live on for a minute without their head

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
        await wait_whole(load.urls[0], whole=False, seconds=NOTICED_SECONDS)
        await asyncio.sleep(DEAD_SECONDS)
        await asyncio.to_thread(stack.engine.run, "start", container)

    return act


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


async def restart_redis(stack: Stack, load: Load) -> None:
    await asyncio.to_thread(stack.engine.run, "restart", stack.containers("redis")[0])


async def kill_gateway(stack: Stack, load: Load) -> None:
    """Its clients go to the other gateway until it is back."""
    container = stack.containers("gateway-cpu")[-1]
    load.urls.remove(stack.url(container))
    await asyncio.to_thread(stack.engine.run, "kill", container)
    await asyncio.sleep(DEAD_SECONDS)
    await asyncio.to_thread(stack.engine.run, "start", container)
    await wait_whole(stack.url(container))
    load.urls[:] = stack.gateways()
    if len(load.urls) < 2:
        raise PreftError("the killed gateway isn't back")


async def join_and_leave(stack: Stack, load: Load) -> None:
    """A decode worker of a further machine: another project, which has Ray's token and the network alone."""
    token = stack.engine.run("exec", stack.containers("head-cpu")[0], "cat", "/run/preft/ray_token")
    with _folder_with(token) as folder:
        try:
            await asyncio.to_thread(stack.node, folder, "up", "--detach", "--no-build", "decode-cpu")
            await wait_whole(load.urls[0], further=1)
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
    Fault("Redis restarted", restart_redis),
    Fault("gateway killed", kill_gateway, may_cut=True),
    Fault("prefill container killed", kill("prefill-cpu")),
    Fault("a machine joins and leaves", join_and_leave),
    Fault("preft serve killed", kill("serve-cpu")),
    Fault("head of Ray killed", kill("head-cpu")),
]
