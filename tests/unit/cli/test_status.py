"""`preft status` asks a server, or reads a real state store and tells live workers from dead ones."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import pytest
from starlette.responses import JSONResponse

from preft.cli import main
from preft.core.cluster import Role, Worker, WorkerLoad, WorkerState, worker_row
from preft.state import open_store
from support.served_app import served_in_thread


def worker(worker_id: str, role: Role, state: WorkerState = WorkerState.READY, age: float = 0.0) -> Worker:
    return Worker(
        id=worker_id,
        role=role,
        state=state,
        address="127.0.0.1:4000",
        fingerprint="f",
        pid=100,
        engine_pids=(101, 102),
        heartbeat=time.time() - age,
        load=WorkerLoad(running=3, kv_blocks_total=50, kv_blocks_free=40),
    )


def remember(state_dir: Path, *workers: Worker) -> None:
    async def write() -> None:
        store = open_store(state_dir / "state.sqlite")
        for one in workers:
            await store.put_worker(one)
        await store.close()

    asyncio.run(write())


def test_json_has_what_a_script_needs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    remember(tmp_path, worker("prefill-0", Role.PREFILL), worker("decode-0", Role.DECODE))
    assert main(["status", "--json", "--state-dir", str(tmp_path)]) == 0
    decode, prefill = json.loads(capsys.readouterr().out)["workers"]
    assert (decode["id"], decode["role"], decode["state"]) == ("decode-0", "decode", "ready")
    assert (prefill["id"], prefill["role"], prefill["pid"]) == ("prefill-0", "prefill", 100)
    assert prefill["engine_pids"] == [101, 102]
    assert prefill["load"]["kv_blocks_free"] == 40


@pytest.mark.parametrize(
    ("state", "age", "shown"),
    [
        (WorkerState.READY, 1.0, "ready"),
        (WorkerState.READY, 60.0, "dead"),
        (WorkerState.DRAINING, 60.0, "dead"),
        (WorkerState.STARTING, 3500.0, "starting"),
        (WorkerState.STARTING, 3700.0, "dead"),
    ],
)
def test_a_silent_worker_is_dead_later_if_it_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], state: WorkerState, age: float, shown: str
) -> None:
    remember(tmp_path, worker("decode-0", Role.DECODE, state, age))
    assert main(["status", "--json", "--state-dir", str(tmp_path)]) == 0
    (row,) = json.loads(capsys.readouterr().out)["workers"]
    assert row["state"] == shown
    assert row["seconds_since_heartbeat"] == pytest.approx(age, abs=2)


def test_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    remember(tmp_path, worker("decode-0", Role.DECODE))
    assert main(["status", "--state-dir", str(tmp_path)]) == 0
    header, row = capsys.readouterr().out.splitlines()
    assert header.startswith("id")
    assert row.split()[:7] == ["decode-0", "decode", "ready", "100", "101,102", "127.0.0.1:4000", "3"]
    assert "40/50" in row


def test_a_server_is_asked(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [worker_row(worker("p0", Role.PREFILL, WorkerState.STARTING, 60.0), time.time())]

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        assert (scope["method"], scope["path"]) == ("GET", "/v1/workers")
        await JSONResponse({"workers": rows})(scope, receive, send)

    with served_in_thread(answer) as port:
        monkeypatch.setenv("PREFT_URL", f"http://127.0.0.1:{port}")
        assert main(["status", "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == json.loads(json.dumps({"workers": rows}))
        monkeypatch.setenv("PREFT_URL", "http://127.0.0.1:1")
        assert main(["status", "--url", f"http://127.0.0.1:{port}"]) == 0
        assert capsys.readouterr().out.splitlines()[1].split()[:4] == ["p0", "prefill", "starting", "100"]
        rows.clear()
        assert main(["status", "--url", f"http://127.0.0.1:{port}"]) == 0
        assert capsys.readouterr().out == "no workers\n"
    assert main(["status"]) == 1
    assert "http://127.0.0.1:1" in capsys.readouterr().err


def test_another_server_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with served_in_thread(JSONResponse([])) as port:
        assert main(["status", "--url", f"http://127.0.0.1:{port}"]) == 1
    assert "is this a PreFT server?" in capsys.readouterr().err


def test_no_workers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    remember(tmp_path)
    assert main(["status", "--state-dir", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "no workers\n"


def test_looking_leaves_no_file_behind(tmp_path: Path) -> None:
    assert main(["status", "--state-dir", str(tmp_path / "none")]) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_broken_file_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "state.sqlite").write_bytes(b"not a database" * 100)
    assert main(["status", "--state-dir", str(tmp_path)]) == 1
    assert "state.sqlite" in capsys.readouterr().err
