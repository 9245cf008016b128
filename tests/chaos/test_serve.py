"""`preft serve` as users run it: Ray starts the workers, brings dead ones back, and a signal ends everything."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from preft.core.cluster import Worker
from preft.state import open_store
from preft_loadgen.served import Served, ServeFailed, served
from support.http import Ask, complete_all
from support.models import make_lora, make_model
from support.reference import Reference

pytestmark = [pytest.mark.vllm, pytest.mark.long, pytest.mark.timeout(900)]

SETTINGS = """
prefill: {kv_cache_bytes: 67108864, staging_bytes: 67108864, max_lora_rank: 16}
decode: {kv_cache_bytes: 67108864, staging_bytes: 67108864}
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("serve")
    model = make_model(root / "tiny", "llama", seed=3)
    return model, make_lora(root / "erin", model, rank=8, seed=4)


@pytest.fixture(scope="module")
def server(folders: tuple[Path, Path]) -> Iterator[Served]:
    yield from serve(folders)


@pytest.fixture(scope="module")
def colocated(folders: tuple[Path, Path]) -> Iterator[Served]:
    yield from serve(folders, "--colocated")


def serve(folders: tuple[Path, Path], *more: str) -> Iterator[Served]:
    """Leaving it sends SIGTERM while streams run.

    That fails if a stream is cut, if the server doesn't end with status 0, or if it leaves a process, a registered
    worker or a file in /dev/shm behind.
    """
    model, adapter = folders
    root = model.parent
    (root / "settings.yaml").write_text(SETTINGS)
    arguments = ["--model", str(model), "--adapter", f"erin={adapter}", "--served-model-name", "base"]
    arguments += ["--config", str(root / "settings.yaml"), "--dtype", "float32", *more]
    name = "".join(["serve", *more])
    state_dir = root / name
    with served(arguments, state_dir=state_dir, log=root / f"{name}.log") as running:
        yield running
        files = shared_memory(running)
        streams = [Stream(running.url, model) for model in ("base", "erin") for _ in range(5)]
        for stream in streams:
            stream.begun.wait(60)
    for stream in streams:
        stream.thread.join(60)
        assert stream.lines[-1] == "[DONE]"
        assert json.loads(stream.lines[-2])["choices"][0]["finish_reason"] == "length"
        assert sum(len(json.loads(line)["choices"][0]["token_ids"]) for line in stream.lines[:-1]) == Stream.TOKENS
    assert not [file for file in files if file.exists()]
    assert asyncio.run(remembered_workers(state_dir)) == []


class Stream:
    """A completion that is streamed to a thread."""

    TOKENS = 400

    def __init__(self, url: str, model: str) -> None:
        self.begun = threading.Event()
        self.lines: list[str] = []
        self.thread = threading.Thread(target=self._read, args=(url, model), daemon=True)
        self.thread.start()

    def _read(self, url: str, model: str) -> None:
        body = {"model": model, "prompt": [5] * 40, "max_tokens": self.TOKENS, "ignore_eos": True}
        body |= {"stream": True, "return_token_ids": True}
        with (
            httpx.Client(timeout=120) as client,
            client.stream("POST", f"{url}/v1/completions", json=body) as response,
        ):
            for line in response.iter_lines():
                if line.startswith("data: "):
                    self.lines.append(line[6:])
                    self.begun.set()


def shared_memory(server: Served) -> set[Path]:
    """The files in /dev/shm that the server's processes have open."""
    found = set()
    for worker in server.workers():
        for pid in (worker["pid"], *worker["engine_pids"]):
            found |= set(re.findall(r"/dev/shm/\S+", Path(f"/proc/{pid}/maps").read_text()))
    return {Path(name) for name in found}


async def remembered_workers(state_dir: Path) -> list[Worker]:
    store = open_store(state_dir / "state.sqlite")
    try:
        return await store.workers()
    finally:
        await store.close()


@pytest.fixture(scope="module")
def reference(folders: tuple[Path, Path]) -> Reference:
    return Reference(folders[0])


def asks(count: int, seed: int) -> list[Ask]:
    draw = random.Random(seed)
    return [Ask([draw.randrange(3, 512) for _ in range(60)], 12, (None, "erin")[i % 2]) for i in range(count)]


def check(reference: Reference, adapter: Path, url: str, seed: int) -> None:
    sent = asks(8, seed)
    got = complete_all(url, "base", sent)
    assert got == [reference.greedy(ask.prompt, 12, adapter if ask.adapter else None) for ask in sent]


def worker_of(server: Served, role: str) -> dict[str, Any]:
    return next(worker for worker in server.workers() if worker["role"] == role)


def wait_for_another(server: Served, old: dict[str, Any]) -> None:
    """Until the worker is ready again in a new process, and the gateway has seen it."""
    end = time.monotonic() + 240
    while time.monotonic() < end:
        worker = next((worker for worker in server.workers() if worker["id"] == old["id"]), old)
        is_back = worker["pid"] != old["pid"] and worker["state"] == "ready"
        if is_back and httpx.get(f"{server.url}/ready").status_code == 200:
            return
        time.sleep(0.5)
    raise AssertionError(f"{old['id']} did not come back")


def test_two_workers_serve_exact_answers(server: Served, folders: tuple[Path, Path], reference: Reference) -> None:
    workers = server.workers()
    assert sorted(worker["role"] for worker in workers) == ["decode", "prefill"]
    assert all(worker["state"] == "ready" and worker["engine_pids"] for worker in workers)
    assert httpx.get(f"{server.url}/ready").status_code == 200
    check(reference, folders[1], server.url, seed=1)


def test_a_killed_decode_worker_is_replaced_and_its_stream_goes_on(
    server: Served, folders: tuple[Path, Path], reference: Reference
) -> None:
    killed_in_mid_stream(server, "decode", folders[1], reference)


def killed_in_mid_stream(server: Served, role: str, adapter: Path, reference: Reference) -> None:
    """One uninterrupted stream: the prompt is prefilled again with the adapter, the tokens so far are replayed."""
    worker = worker_of(server, role)
    prompt = asks(1, seed=2)[0].prompt
    body = {
        "model": "erin",
        "prompt": prompt,
        "max_tokens": 1200,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }
    tokens: list[int] = []
    killed = False
    with (
        httpx.Client(timeout=400) as client,
        client.stream("POST", f"{server.url}/v1/completions", json=body) as response,
    ):
        assert response.status_code == 200
        for line in response.iter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = json.loads(line[6:])
            assert "error" not in event, event
            tokens += event["choices"][0].get("token_ids") or []
            if len(tokens) >= 20 and not killed:
                os.kill(worker["pid"], signal.SIGKILL)
                killed = True
    assert killed
    assert tokens == reference.greedy(prompt, 1200, adapter)
    wait_for_another(server, worker)


def test_a_killed_engine_takes_its_worker_along_and_both_come_back(
    server: Served, folders: tuple[Path, Path], reference: Reference
) -> None:
    prefill = worker_of(server, "prefill")
    os.kill(prefill["engine_pids"][0], signal.SIGKILL)
    wait_for_another(server, prefill)
    check(reference, folders[1], server.url, seed=3)


def test_a_killed_colocated_worker_is_replaced_and_its_stream_goes_on(
    colocated: Served, folders: tuple[Path, Path], reference: Reference
) -> None:
    assert [worker["role"] for worker in colocated.workers()] == ["colocated"]
    check(reference, folders[1], colocated.url, seed=4)
    killed_in_mid_stream(colocated, "colocated", folders[1], reference)
    check(reference, folders[1], colocated.url, seed=5)


def test_workers_that_can_never_start_end_the_cluster(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """Here the KV cache is too small for one sequence. It isn't tried for ever, and the reason is said."""
    arguments = ["--model", str(folders[0]), "--colocated", "--set", "prefill.kv_cache_bytes=1048576"]
    with (
        pytest.raises(ServeFailed, match="couldn't be started, several times in a row"),
        served(arguments, state_dir=tmp_path / "state", log=tmp_path / "serve.log", ready_seconds=400),
    ):
        pytest.fail("it serves")
