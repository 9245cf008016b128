"""Network namespaces of this machine: one for the prefill workers, one for each decode worker. Needs root.

Each namespace has a link to the machine, where the gateways are. A link of its own joins the prefill workers with each
decode worker: KV alone goes over it. The rules for cut, slow and lossy links stand in the namespaces alone, so the
machine's own network stays as it is.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass

from preft.core.errors import PreftError

NEEDS = ("ip", "tc", "iptables")
PREFIX = f"10.{100 + os.getpid() % 100}"  # of all addresses; another run has others
SMALL_BURST = "32k"
MTU = 1500  # bytes


def missing() -> str | None:
    """Why there can be no namespaces here; None if there can."""
    if os.geteuid() != 0:
        return "network faults need root"
    absent = [name for name in NEEDS if shutil.which(name) is None]
    return f"network faults need {', '.join(absent)} (apt install iproute2 iptables)" if absent else None


def _run(*command: str) -> str:
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode != 0:
        raise PreftError(f"{' '.join(command)}: {ran.stderr.strip() or ran.returncode}")
    return ran.stdout


@dataclass(frozen=True, slots=True)
class Namespace:
    """`host` is the address of the namespace, for all others."""

    name: str
    host: str

    def command(self, *command: str) -> list[str]:
        """`command`, to be run in the namespace."""
        return ["ip", "netns", "exec", self.name, *command]

    def run(self, *command: str) -> str:
        return _run(*self.command(*command))


@dataclass(frozen=True, slots=True)
class KvLink:
    """The link between the prefill workers and a decode worker. All faults act in both directions."""

    ends: tuple[tuple[Namespace, str], tuple[Namespace, str]]  # each with its device; prefill first

    def lose(self, share: float) -> None:
        """Drops this share of all packets; 1 cuts the link, without a word to either side."""
        for space, device in self.ends:
            chance = [] if share >= 1 else ["-m", "statistic", "--mode", "random", "--probability", str(share)]
            space.run("iptables", "-A", "INPUT", "-i", device, *chance, "-j", "DROP")

    def slow_down(self, bytes_per_second: int) -> None:
        for space, device in self.ends:
            rate = f"{8 * bytes_per_second}bit"
            space.run(
                *("tc", "qdisc", "add", "dev", device, "root", "tbf"),
                *("rate", rate, "burst", SMALL_BURST, "latency", "10s"),
            )

    def heal(self) -> None:
        for space, device in self.ends:
            space.run("iptables", "-F", "INPUT")
            subprocess.run(space.command("tc", "qdisc", "del", "dev", device, "root"), capture_output=True, check=False)

    def under_way(self) -> int:
        """Bytes that wait on a slow link towards the decode worker."""
        space, device = self.ends[0]
        found = re.search(r"backlog (\d+)([KM]?)b", space.run("tc", "-s", "qdisc", "show", "dev", device))
        return int(found[1]) * {"": 1, "K": 1 << 10, "M": 1 << 20}[found[2]] if found else 0


class Network:
    """The namespaces `prefill` and `decode`, and their `links`. `machine` is the machine's address in the network."""

    machine = f"{PREFIX}.0.1"

    def __init__(self, decode_workers: int) -> None:
        self._mark = f"preft-{os.getpid()}"
        self._made: list[str] = []
        try:
            self.prefill = self._namespace("p", 1)
            self.decode = [self._namespace(f"d{number}", 2 + number) for number in range(decode_workers)]
            self.links = [self._link(space, number) for number, space in enumerate(self.decode)]
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        for name in self._made:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)

    def _namespace(self, name: str, number: int) -> Namespace:
        space = Namespace(f"{self._mark}-{name}", f"{PREFIX}.{number}.2")
        _run("ip", "netns", "add", space.name)
        self._made.append(space.name)
        outside = f"pf{os.getpid() % 100000}{name}"
        _run("ip", "link", "add", outside, "type", "veth", "peer", "name", "out", "netns", space.name)
        _run("ip", "address", "add", f"{PREFIX}.{number}.1/24", "dev", outside)
        _run("ip", "link", "set", outside, "up")
        space.run("ip", "address", "add", f"{space.host}/24", "dev", "out")
        for device in ("out", "lo"):
            space.run("ip", "link", "set", device, "up")
        return space

    def _link(self, other: Namespace, number: int) -> KvLink:
        """Joins a decode worker's namespace with the prefill workers'. Their addresses are reached over the link."""
        near, far = f"kv{number}", "kv"
        self.prefill.run("ip", "link", "add", near, "type", "veth", "peer", "name", far, "netns", other.name)
        for space, device, peer in ((self.prefill, near, other), (other, far, self.prefill)):
            space.run("ip", "link", "set", device, "gso_max_size", str(MTU), "up")  # each packet may be lost alone
            space.run("ip", "route", "add", f"{peer.host}/32", "dev", device, "src", space.host)
        return KvLink(((self.prefill, near), (other, far)))
