"""`preft serve` starts and ends workers as the load asks for it. Ray and processes are real, engines are fake."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from support.lora_folders import write_base
from support.processes import ServerProcess, running
from support.small_tokenizers import byte_level
from support.worker_servers import NO_ENGINES

pytestmark = pytest.mark.timeout(240)

BUSY = 90.0  # seconds, on a machine that does other things too
SETTINGS = {
    "served_model_name": "base",
    "port": 0,
    "max_model_len": 128,
    "prefill": {"max_replicas": 2, "max_num_seqs": 4, "staging_bytes": 1 << 20},
    "decode": {"max_replicas": 2, "max_num_seqs": 4, "staging_bytes": 1 << 20},
    "scaling": {"up_seconds": 0.5, "down_seconds": 3.0},
    "router": {"max_inflight_prefills": 1},
}


class Load:
    """Requests of several clients at once, each after the other, until `stop`."""

    def __init__(self, url: str, clients: int, tokens: int, threads: ThreadPoolExecutor) -> None:
        self._url, self._tokens = url, tokens
        self._going = True
        self._clients = [threads.submit(self._ask, number) for number in range(clients)]

    def stop(self) -> dict[int, set[tuple[int, ...]]]:
        """Waits for the last answers. Returns all answers, by prompt."""
        self._going = False
        answers: dict[int, set[tuple[int, ...]]] = {}
        for client in self._clients:
            for number, tokens in client.result():
                answers.setdefault(number, set()).add(tokens)
        return answers

    def _ask(self, number: int) -> list[tuple[int, tuple[int, ...]]]:
        body = {"model": "base", "prompt": [5, 6, number], "max_tokens": self._tokens, "temperature": 0}
        answers = []
        with httpx.Client(base_url=self._url, timeout=BUSY, trust_env=False) as client:
            while self._going:
                reply = client.post("/v1/completions", json=body | {"ignore_eos": True, "return_token_ids": True})
                assert reply.status_code == 200, reply.text
                answers.append((number, tuple(reply.json()["choices"][0]["token_ids"])))
        return answers


def ready(url: str, role: str) -> list[str]:
    workers = httpx.get(f"{url}/v1/workers", timeout=BUSY, trust_env=False).json()["workers"]
    return sorted(one["id"][9:] for one in workers if one["state"] == "ready" and one["role"] == role)


def becomes(server: ServerProcess, url: str, role: str, members: list[str]) -> None:
    end = time.monotonic() + BUSY
    while ready(url, role) != members:
        assert time.monotonic() < end, server.output
        time.sleep(0.2)


@contextmanager
def serving(folder: Path) -> Iterator[ServerProcess]:
    model = write_base(byte_level(folder / "base"))
    settings = {**SETTINGS, "model": str(model), "state_dir": str(folder / "state")}
    (folder / "settings.json").write_text(json.dumps(settings))
    with running(["--config", str(folder / "settings.json")], folder / "log", "support.fake_serve") as server:
        yield server


@pytest.mark.parametrize(("role", "tokens"), [("prefill", 1), ("decode", 60)])
def test_workers_follow_the_load(tmp_path: Path, role: str, tokens: int) -> None:
    """No answer changes, and none is lost, while a worker comes and one goes."""
    with serving(tmp_path) as server, ThreadPoolExecutor(16) as threads:
        url = server.said(r"is ready on (http://\S+)", BUSY)
        heavy = Load(url, 8, tokens, threads)
        becomes(server, url, role, [f"{role}-0", f"{role}-1"])
        answers = heavy.stop()
        light = Load(url, 1, 60, threads)
        server.said(rf"({role}: one less, the workers have a pressure of 0)", BUSY)
        end = time.monotonic() + BUSY
        while len(ready(url, role)) > 1:
            assert time.monotonic() < end, server.output
            time.sleep(0.2)
        long = light.stop()
    assert set(answers) == set(range(8))
    assert all(len(each) == 1 for each in answers.values())
    assert len(long[0]) == 1
    assert next(iter(answers[0])) == next(iter(long[0]))[:tokens]


@pytest.mark.long
def test_an_added_worker_that_cannot_start_ends_alone(tmp_path: Path) -> None:
    """The others go on serving, the console says so, and later another worker is added."""
    with serving(tmp_path) as server, ThreadPoolExecutor(16) as threads:
        url = server.said(r"is ready on (http://\S+)", BUSY)
        (tmp_path / "state" / NO_ENGINES).touch()
        load = Load(url, 8, 60, threads)
        server.said(
            r"(decode-1: it couldn't be started \(1 of 3 attempts\): .*there is no engine for this worker)", BUSY
        )
        server.said(rf"(decode-1: it is given up; its log is {re.escape(str(tmp_path))}\S+/decode-1\.log)", BUSY)
        server.said(r"(decode-1: it ends)", BUSY)
        assert ready(url, "decode") == ["decode-0"]
        (tmp_path / "state" / NO_ENGINES).unlink()
        end = time.monotonic() + BUSY
        while len(ready(url, "decode")) < 2:
            assert time.monotonic() < end, server.output
            time.sleep(0.2)
        answers = load.stop()
    assert set(answers) == set(range(8))
    assert all(len(each) == 1 for each in answers.values())
