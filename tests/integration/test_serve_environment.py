"""`preft serve` in a user's environment: settings in variables, variables that are meant for others, secrets unseen.

One server under real Ray is looked at. Its engines are fake.
"""

from __future__ import annotations

import json
import os
import re
import resource
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from preft.cli import main
from preft.core.request import Sampling
from support.fake_engine import tokens_of
from support.lora_folders import write_base
from support.processes import ServerProcess, running
from support.redis_server import running_redis
from support.small_tokenizers import byte_level

pytestmark = pytest.mark.timeout(180)

SECRET = "only-in-a-file-of-its-own"
PASSWORD = "only-in-a-variable"
PROXY = "http://127.0.0.1:9"  # nobody listens
FOR_OTHERS = {
    "RAY_ADDRESS": "127.0.0.1:6399",
    "RAY_NAMESPACE": "other",
    "RAY_RUNTIME_ENV_HOOK": "no.such.hook",
    "RAY_USE_TLS": "1",
    "RAY_AUTH_MODE": "disabled",
    "PREFT_SERVICE_HOST": "10.0.0.1",
    "PREFT_PORT_8000_TCP": "tcp://10.0.0.1:8000",
    **{f"{kind}_proxy": PROXY for kind in ("http", "https", "all", "grpc")},
    **{f"{kind}_PROXY": PROXY for kind in ("HTTP", "HTTPS", "ALL", "GRPC")},
}


@dataclass
class Served:
    process: ServerProcess
    url: str
    folder: Path
    ray_folder: Path

    def children(self) -> list[Path]:
        """/proc of all processes below the server."""
        parents = {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
            except OSError:  # the process has ended
                continue
        below, found = {self.process.pid}, list[Path]()
        while level := {pid for pid, parent in parents.items() if parent in below} - below:
            below |= level
            found += [Path("/proc", str(pid)) for pid in level]
        return found


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("env")
    byte_level(folder / "base")
    write_base(folder / "base")
    (folder / "secret").write_text(f"{SECRET}\n")
    long = folder / ("t" * 70)
    long.mkdir()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with pytest.MonkeyPatch.context() as patch, running_redis(folder / "redis", password=PASSWORD) as redis:
        own = {
            "MODEL": str(folder / "base"),
            "PORT": "0",
            "MAX_MODEL_LEN": "128",
            "STATE_DIR": str(folder / "state"),
            "STATE": redis.url(),
            "CLUSTER_SECRET_FILE": str(folder / "secret"),
            "SHUTDOWN_TIMEOUT": "500ms",
            "PREFILL__STAGING_BYTES": "3MiB",
            "DECODE__REPLICAS": "7",
            "DECODE__STAGING_BYTES": "5242880",
            "STORE__HOST_BYTES": "1MiB",
        }
        folders = {"TMPDIR": str(long), "RAY_TMPDIR": str(long)}
        for name, text in {**{f"PREFT_{name}": text for name, text in own.items()}, **folders, **FOR_OTHERS}.items():
            patch.setenv(name, text)
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, limits[1]), limits[1]))
        try:
            with running(["--decode", "1"], folder / "serve.log", "support.fake_serve") as process:
                url = process.said(r"is ready on (http://\S+)", 120)
                (ray_folder,) = Path("/tmp").glob(f"preft-{process.pid}-*")
                yield Served(process, url, folder, ray_folder)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def get(served: Served, path: str) -> str:
    return httpx.get(f"{served.url}{path}", trust_env=False, timeout=20).text


def text_of(file: Path) -> str:
    try:
        return file.read_bytes().decode(errors="replace")
    except OSError:  # the process has ended
        return ""


def test_requests_are_answered(served: Served) -> None:
    body = {"model": "base", "prompt": [5, 6], "max_tokens": 4, "temperature": 0, "ignore_eos": True}
    reply = httpx.post(
        f"{served.url}/v1/completions", json={**body, "return_token_ids": True}, trust_env=False, timeout=20
    )
    expected = tokens_of("", [5, 6], Sampling(max_tokens=4, temperature=0.0, ignore_eos=True))
    assert reply.json()["choices"][0]["token_ids"] == expected


def test_the_workers_have_the_settings_of_the_server(served: Served) -> None:
    """Ray starts the workers; a flag and variables of several kinds say how many, and how large."""
    sizes = re.findall(r'^preft_staging_bytes{worker="\w+-(\w+)-0"} (\S+)$', get(served, "/metrics"), re.MULTILINE)
    assert sorted((role, float(size)) for role, size in sizes) == [
        ("decode", 5 << 20),
        ("prefill", 3 << 20),
    ]


def test_no_secret_is_seen(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    """Not in an answer, nor in a process below the server, nor in a log, also after a worker's crash."""
    os.kill(json.loads(get(served, "/v1/workers"))["workers"][0]["pid"], signal.SIGKILL)
    served.process.said(r"(?s)(it has ended.*it is ready after)", 60)
    assert main(["status", "--json", "--url", served.url]) == 0
    shown = [get(served, path) for path in ("/metrics", "/v1/workers", "/v1/models", "/health", "/openapi.json")]
    shown += [capsys.readouterr().out, served.process.output, Path(f"/proc/{served.process.pid}/cmdline").read_text()]
    below = served.children()
    assert len(below) > 5
    logs = [path for root in (served.ray_folder, served.folder / "state") for path in root.rglob("*") if path.is_file()]
    assert {"raylet.out", "gcs_server.out", "prefill-0.log", "serve.log"} <= {path.name for path in logs}
    files = [process / name for process in below for name in ("cmdline", "comm", "environ")] + logs
    shown += map(text_of, files)
    assert [secret for secret in (SECRET, PASSWORD) if any(secret in text for text in shown)] == []


def test_a_signal_to_ray_s_processes_too_ends_the_server(served: Served) -> None:
    """So do service supervisors that signal a whole group. A call to the killed Ray would take a minute."""
    os.killpg(served.process.pid, signal.SIGTERM)
    assert served.process.ended(50) == 0
