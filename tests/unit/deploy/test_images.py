"""The Dockerfiles, the pinned packages, and the entry point of the images."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
import tomllib
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import preft
from preft_loadgen.child import bound

ROOT = Path(__file__).parents[3]
DOCKER = ROOT / "deploy" / "docker"
DOCKERFILES = sorted([*DOCKER.glob("*.Dockerfile"), *(ROOT / "bench" / "compose" / "images").glob("*.Dockerfile")])
IMAGES = {"cpu": "cpu", "cuda": "gpu"}  # and the extra of its packages
BUILD_TOOLS = {"make", "cmake", "git", "g++", "build-essential", "python3-venv", "python3-pip"}
FOR_TRITON = {"gcc", "libc6-dev", "python3-dev"}
SAID_SECONDS = 20.0


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.name)
def test_the_dockerfiles_pass_hadolint(file: Path) -> None:
    linter = Path(sys.executable).with_name("hadolint")
    done = subprocess.run(
        [linter, "-c", str(ROOT / ".hadolint.yaml"), str(file)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("image", IMAGES)
def test_the_last_stage_is_small_and_not_root(image: str) -> None:
    text = (DOCKER / f"{image}.Dockerfile").read_text()
    last = text[text.rindex("\nFROM ") :]
    packages = set(re.findall(r"[\w+.-]+", last[last.index("--no-install-recommends") : last.index("rm -rf")]))
    assert not packages & BUILD_TOOLS
    assert packages >= FOR_TRITON if image == "cuda" else not packages & FOR_TRITON
    assert "\nUSER 10001:10001\n" in last
    assert f"ARG VERSION={preft.__version__}\n" in last
    assert re.search(r"^ARG BASE=\S+:[\w.-]*\d[\w.-]*$", text, re.MULTILINE)


@pytest.mark.parametrize("extra", IMAGES.values())
def test_every_dependency_has_a_pin_that_its_range_allows(extra: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = [Requirement(line) for line in (DOCKER / f"constraints-{extra}.txt").read_text().splitlines()]
    versions = {pin.name: str(pin.specifier).removeprefix("==") for pin in pins}
    optional = project["optional-dependencies"]
    for line in [*project["dependencies"], *(line for name in (extra, "s3", "gs", "hf") for line in optional[name])]:
        wanted = Requirement(line)
        assert wanted.specifier.contains(versions[wanted.name.replace("_", "-")]), line


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the entry point that uses this folder, with programs of its own in place of Ray's and NVIDIA's."""
    text = (DOCKER / "container.sh").read_text()
    for place, name in (("/run/preft", "secrets"), ("/var/lib/preft", "state"), ("/tmp/container-role", "role")):
        text = text.replace(place, str(tmp_path / name))
    (tmp_path / "secrets").mkdir()
    programs = {
        "container": text.replace("sleep 10", "sleep 0.1").replace("sleep 1;", "sleep 0.1;"),
        "ray": '#!/bin/sh\necho "gpu $CUDA_VISIBLE_DEVICES redis $RAY_REDIS_ADDRESS $*"\nexec sleep 60\n',
        "nvidia-smi": "#!/bin/sh\nprintf '0\\n1\\n'\n",
        "preft": '#!/bin/sh\necho "preft $*"\n',
    }
    for name, program in programs.items():
        path = tmp_path / name
        path.write_text(program)
        path.chmod(0o755)
    return tmp_path


class Container:
    """The entry point with its own output file, until the end of `stack`."""

    def __init__(
        self, stack: ExitStack, folder: Path, *arguments: str, head: str = "127.0.0.1:1", tables: str = ""
    ) -> None:
        self._log = folder / f"{len(list(folder.iterdir()))}.log"
        environment = {"PATH": f"{folder}:/usr/bin:/bin", "PREFT_RAY_ADDRESS": head, "RAY_REDIS_ADDRESS": tables}
        with self._log.open("wb") as output:
            self.process = subprocess.Popen(
                bound([str(folder / "container"), *arguments]),
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        stack.callback(self.kill)

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def said(self, text: str) -> str:
        """Waits for a line with `text`."""
        end = time.monotonic() + SAID_SECONDS
        while time.monotonic() < end:
            for line in self._log.read_text().splitlines():
                if text in line:
                    return line
            time.sleep(0.02)
        raise AssertionError(f"{text!r} isn't in the output:\n{self._log.read_text()}")


def test_the_head_makes_the_missing_secrets_for_its_readers_alone(folder: Path) -> None:
    secrets = folder / "secrets"
    (secrets / "ray_token").write_text("mine\n")
    with ExitStack() as stack:
        redis = socket.socket()
        redis.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{redis.getsockname()[1]}"
        head = Container(stack, folder, "head", tables=address)
        head.said(f"waiting for Redis at {address}")
        stack.enter_context(redis).listen()
        started = head.said("start --")
    assert (secrets / "ray_token").read_text() == "mine\n"
    password = (secrets / "redis_password").read_text().strip()
    assert len(password) == len((secrets / "cluster_secret").read_text().strip()) == 64
    assert (secrets / "state").read_text() == f"redis://:{password}@redis:6379/0\n"
    assert (f"redis {address} " in started, password in started) == (True, False)
    assert "--node-ip-address=127.0.0.1 " in started
    assert (secrets / "redis.conf").read_text() == f"requirepass {password}\n"
    assert {path.name for path in secrets.iterdir() if path.stat().st_mode & 0o077} == {"redis.conf", "ray_token"}


def test_a_node_waits_for_the_token_and_the_head(folder: Path) -> None:
    (folder / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    with ExitStack() as stack:
        head = socket.socket()
        head.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{head.getsockname()[1]}"
        node = Container(stack, folder, "node", "decode", head=address)
        node.said("waiting for " + str(folder / "secrets" / "ray_token"))
        (folder / "secrets" / "ray_token").write_text("token")
        node.said(f"waiting for the head of Ray at {address}")
        stack.enter_context(head).listen()
        joined = node.said("start --")
    assert f"--address={address}" in joined
    assert '--num-gpus=0 --resources={"decode": 1} --block' in joined


def test_each_node_of_a_machine_takes_a_gpu_of_its_own(folder: Path) -> None:
    (folder / "secrets" / "ray_token").write_text("token")
    with ExitStack() as stack:
        head = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        address = f"127.0.0.1:{head.getsockname()[1]}"
        first = Container(stack, folder, "node", "prefill", head=address)
        assert "gpu 0 " in first.said("--num-gpus=1")
        assert "gpu 1 " in Container(stack, folder, "node", "decode", head=address).said("--num-gpus=1")
        third = Container(stack, folder, "node", "decode", head=address)
        third.said("waiting for a GPU")
        first.kill()
        assert "gpu 0 " in third.said("--num-gpus=1")


def test_a_gateway_waits_for_redis(folder: Path) -> None:
    with ExitStack() as stack:
        redis = socket.socket()
        redis.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{redis.getsockname()[1]}"
        (folder / "secrets" / "cluster_secret").write_text("secret")
        (folder / "secrets" / "state").write_text(f"rediss://user:p%40ss@{address}/3?ssl_cert_reqs=none")
        gateway = Container(stack, folder, "gateway", "--set", "seed=1")
        gateway.said(f"waiting for Redis at {address}")
        stack.enter_context(redis).listen()
        gateway.said("preft gateway --set seed=1")


def test_any_other_command_runs_as_it_is(folder: Path) -> None:
    with ExitStack() as stack:
        Container(stack, folder, "preft", "status").said("preft status")
