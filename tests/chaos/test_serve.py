"""`preft serve` as users run it: Ray starts the workers, brings dead ones back, and a signal ends everything."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from preft_loadgen.served import Served, ServeFailed, served
from support.http import Ask, complete_all
from support.models import make_lora, make_model
from support.reference import Reference

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

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
    """Leaving it fails if the server doesn't end by SIGINT with status 0, or leaves a process behind."""
    model, adapter = folders
    root = model.parent
    (root / "settings.yaml").write_text(SETTINGS)
    arguments = ["--model", str(model), "--adapter", f"erin={adapter}", "--served-model-name", "base"]
    arguments += ["--config", str(root / "settings.yaml"), "--dtype", "float32", *more]
    name = "".join(["serve", *more])
    with served(arguments, state_dir=root / name, log=root / f"{name}.log") as running:
        yield running


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
