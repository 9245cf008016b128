"""A Ray cluster of this machine in real Ray processes, and `preft serve` on it over fake engines."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from preft.cluster.ray_folder import new_ray_folder
from preft_loadgen.child import bound
from support.lora_folders import write_base
from support.processes import TESTS, ServerProcess, running
from support.redis_server import RedisServer, free_port
from support.small_tokenizers import byte_level

HEAD = "127.0.0.2"


class Nodes:
    """A Ray cluster of this machine: a head that runs nothing, and nodes with custom resources."""

    def __init__(self, stack: ExitStack, folder: Path, redis: RedisServer | None = None) -> None:
        """With `redis`, the head keeps its tables there, and can be started again."""
        self._stack, self._folder = stack, folder
        self.address = f"{HEAD}:{free_port()}"  # Ray would replace 127.0.0.1 by the machine's outside address
        self._nodes: dict[str, subprocess.Popen[bytes]] = {}
        self.environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([TESTS, *filter(None, [os.environ.get("PYTHONPATH")])]),
            "RAY_AUTH_MODE": "disabled",
        }
        self._redis = redis
        self.start_head()

    def start_head(self) -> None:
        port = self.address.rpartition(":")[2]
        arguments = ["--head", "--port", port, "--include-dashboard=false", "--num-cpus=0"]
        if self._redis is not None:
            self.environment["RAY_REDIS_ADDRESS"] = f"127.0.0.1:{self._redis.port}"
        self._start(HEAD, *arguments)
        self.environment.pop("RAY_REDIS_ADDRESS", None)

    def add(self, host: str, resources: dict[str, float]) -> None:
        self._start(host, "--address", self.address, "--num-cpus=1", f"--resources={json.dumps(resources)}")

    def kill(self, host: str) -> None:
        """The machine is gone: all its processes end at once."""
        node = self._nodes.pop(host)
        os.killpg(node.pid, signal.SIGKILL)
        node.wait()

    def terminate(self, host: str) -> subprocess.Popen[bytes]:
        """The end of a service or a container: SIGTERM to the process that started the node."""
        node = self._nodes[host]
        node.send_signal(signal.SIGTERM)
        return node

    def drain(self, host: str) -> subprocess.Popen[bytes]:
        """`ray drain-node`, without a deadline."""
        found = self.run(
            f"print(*(one['NodeID'] for one in ray.nodes() if one['Alive'] and one['NodeName'] == '{host}'))"
        )
        command = [str(Path(sys.executable).with_name("ray")), "drain-node", f"--address={self.address}"]
        command += [f"--node-id={found.split()[-1]}", "--reason=DRAIN_NODE_REASON_PREEMPTION"]
        subprocess.run([*command, "--reason-message=test"], env=self.environment, capture_output=True, check=True)
        return self._nodes[host]

    def run(self, script: str) -> str:
        """What a program prints that has joined this Ray."""
        begin = f"import ray; ray.init('{self.address}', logging_level='ERROR')\n"
        command = [sys.executable, "-c", begin + script]
        return subprocess.run(command, env=self.environment, capture_output=True, check=True).stdout.decode()

    def _start(self, host: str, *arguments: str) -> None:
        folder = new_ray_folder()
        self._stack.callback(shutil.rmtree, folder, ignore_errors=True)
        command = [str(Path(sys.executable).with_name("ray")), "start", "--block", f"--node-ip-address={host}"]
        command += [f"--temp-dir={folder}", "--object-store-memory=80000000", "--disable-usage-stats", *arguments]
        log = (self._folder / f"ray-{host}.log").open("ab")
        self._stack.callback(log.close)
        node = subprocess.Popen(
            bound(command), env=self.environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        self._nodes[host] = node
        self._stack.callback(self._end, host)

    def _end(self, host: str) -> None:
        if host in self._nodes:
            with suppress(ProcessLookupError):  # it has ended
                self.kill(host)


def settings_of(folder: Path, nodes: Nodes, **changes: object) -> Path:
    """A settings file. Each worker takes a node's resource of its role's name."""
    model = write_base(byte_level(folder / "base"))
    given: dict[str, object] = {
        "model": str(model),
        "served_model_name": "base",
        "state_dir": str(folder / "state"),
        "port": 0,
        "max_model_len": 128,
        "ray_address": nodes.address,
        "prefill": {"resources": {"prefill": 1}, "staging_bytes": 1 << 20},
        "decode": {"resources": {"decode": 1}, "staging_bytes": 1 << 20},
        **changes,
    }
    path = folder / "settings.json"
    path.write_text(json.dumps(given))
    return path


def serve(stack: ExitStack, nodes: Nodes, config: Path) -> ServerProcess:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        return stack.enter_context(running(["--config", str(config)], config.with_suffix(".log"), "support.fake_serve"))
