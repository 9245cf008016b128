"""docker-compose.yml, brought up: profile `cpu`, two workers of each role, two gateways."""

from __future__ import annotations

import asyncio
import json
import os
import time
from typing import Any

import yaml

from bench.compose.engine import ROOT, Engine
from bench.compose.locks import Locks
from preft.core.errors import PreftError
from preft_loadgen.errors import RequestFailed
from preft_loadgen.transport.http import HttpClient

PROJECT = "preft-test"
EACH = 2  # containers of a role, and gateways
SCALED = ("prefill-cpu", "decode-cpu", "gateway-cpu")
ALONE = ("redis", "ray-tables", "head-cpu", "serve-cpu")
MONITORS = ("prometheus", "grafana")
READY_SECONDS = 900.0
LOOK_SECONDS = 0.5


def compose_file() -> dict[str, Any]:
    """docker-compose.yml, with its variables as they stand."""
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    return loaded


def environment(locks: Locks) -> dict[str, str]:
    """The variables of .env.example, whatever a .env says, with free ports and a network of their own."""
    lines = (ROOT / ".env.example").read_text().splitlines()
    variables = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    own = {
        "CLUSTER_NETWORK": PROJECT,
        **dict.fromkeys(("PREFILL_WORKERS", "DECODE_WORKERS", "GATEWAYS"), str(EACH)),
        "GATEWAY_PORTS": "127.0.0.1::8000",
        "PROMETHEUS_PORT": "127.0.0.1:",
        "GRAFANA_PORT": "127.0.0.1:",
    }
    return {**os.environ, **variables, **own, **locks.environ}


class Stack:
    """The running containers. Those of one service have an order, so that the last one can be named."""

    def __init__(self, engine: Engine, without: list[str], locks: Locks | None = None) -> None:
        self.engine = engine
        self.locks = locks or Locks()
        self.services = [*ALONE, *SCALED, *(one for one in MONITORS if one not in without)]

    def compose(self, *arguments: str) -> str:
        command = [*self.engine.compose, "-p", PROJECT, "--profile", "cpu"]
        return self.engine.run(*arguments, command=command, environ=environment(self.locks))

    def node(self, secrets: str, *arguments: str) -> str:
        """Compose on a further machine, whose folder `secrets` has Ray's token."""
        files = ["-f", "docker-compose.yml", "-f", "docker-compose.node.yml"]
        command = [*self.engine.compose, *files, "-p", f"{PROJECT}-node", "--profile", "cpu"]
        return self.engine.run(
            *arguments,
            command=command,
            environ=environment(self.locks) | {"SECRETS_DIR": secrets, "DECODE_WORKERS": "1"},
        )

    def up(self) -> None:
        self.compose("up", "--detach", "--no-build", *self.services)

    def down(self) -> None:
        self.compose("down", "--volumes", "--timeout", "10")

    def containers(self, service: str) -> list[str]:
        """Ids, in the order of the containers' names."""
        labels = [
            f"label=com.docker.compose.{key}={value}" for key, value in (("project", PROJECT), ("service", service))
        ]
        filters = [word for label in labels for word in ("--filter", label)]
        lines = self.engine.run("ps", "--all", "--no-trunc", *filters, "--format", "{{.Names}} {{.ID}}").splitlines()
        return [line.split()[1] for line in sorted(lines)]

    def url(self, container: str, port: int = 8000) -> str:
        """Where a container's port is on this machine."""
        return "http://" + self.engine.run("port", container, str(port)).splitlines()[0]

    def address(self, container: str) -> str:
        """The container's IP address in the cluster's network."""
        described = json.loads(self.engine.run("inspect", container))[0]
        return str(described["NetworkSettings"]["Networks"][PROJECT]["IPAddress"])

    def gateways(self) -> list[str]:
        return [self.url(one) for one in self.containers("gateway-cpu")]

    def adoptions(self) -> int:
        """How often `preft serve` has adopted workers."""
        return self.engine.run("logs", self.containers("serve-cpu")[0]).count("are adopted")

    def logs(self) -> str:
        """The last lines of every container."""
        told = []
        for service in self.services:
            for number, one in enumerate(self.containers(service), 1):
                told.append(f"--- {service} {number}\n{self.engine.run('logs', '--tail', '15', one)}")
        return "\n".join(told)

    def client(self, url: str, *, timeout: float = 600.0) -> HttpClient:
        return HttpClient(url, timeout=timeout, api_key=self.locks.key)

    async def workers(self, url: str) -> list[dict[str, Any]]:
        """All workers, as one gateway sees them; none if it doesn't answer."""
        try:
            found: list[dict[str, Any]] = (await self.client(url).get_json("/v1/workers"))["workers"]
        except RequestFailed:
            return []
        return found

    async def processes(self, url: str) -> dict[str, int]:
        """The workers' processes in their containers, by worker."""
        return {one["id"]: one["pid"] for one in await self.workers(url)}

    async def is_whole(self, url: str, further: int) -> bool:
        roles = [one["role"] for one in await self.workers(url) if one["state"] == "ready"]
        return roles.count("prefill") == EACH and roles.count("decode") == EACH + further

    async def wait_whole(
        self, url: str, *, whole: bool = True, further: int = 0, seconds: float = READY_SECONDS
    ) -> float:
        """Waits until the gateway sees all workers ready for two looks (or not all); returns the seconds taken.

        `further` decode workers are on other machines. Raises PreftError.
        """
        began = time.monotonic()
        looks = 0
        while looks < (2 if whole else 1):
            looks = looks + 1 if await self.is_whole(url, further) == whole else 0
            if time.monotonic() - began > seconds:
                raise PreftError(f"the cluster is {'not whole' if whole else 'still whole'} after {seconds:.0f} s")
            await asyncio.sleep(LOOK_SECONDS)
        return time.monotonic() - began

    async def leftovers(self, url: str) -> dict[str, int]:
        """What idle workers still hold: requests, handles and staging bytes. Empty if all is given back."""
        keys = ("running", "open_handles", "staging_bytes_used")
        held = {key: sum(one["status"][key] for one in await self.workers(url)) for key in keys}
        return {key: value for key, value in held.items() if value}
