"""`preft status` asks a server for its workers."""

from __future__ import annotations

import json
from typing import Any

import pytest
from starlette.responses import JSONResponse

from preft.cli import main
from preft.core.cluster import Role, Worker, WorkerSeen, WorkerState, WorkerStatus
from support.served_app import served_in_thread

WORKER = Worker("p0", Role.PREFILL, "127.0.0.1:4000", "f", 100, (101, 102), kv_blocks=50)


def test_a_server_is_asked(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [WorkerSeen(WORKER, WorkerState.READY, WorkerStatus(running=3, kv_blocks_used=10), 0.25).as_json()]

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        assert (scope["method"], scope["path"]) == ("GET", "/v1/workers")
        await JSONResponse({"workers": rows})(scope, receive, send)

    with served_in_thread(answer) as port:
        monkeypatch.setenv("PREFT_URL", f"http://127.0.0.1:{port}")
        assert main(["status", "--json"]) == 0
        (row,) = json.loads(capsys.readouterr().out)["workers"]
        assert (row["id"], row["role"], row["state"], row["pid"]) == ("p0", "prefill", "ready", 100)
        assert row["engine_pids"] == [101, 102]
        assert (row["kv_blocks"], row["status"]["kv_blocks_used"], row["seconds_since_heard"]) == (50, 10, 0.2)
        monkeypatch.setenv("PREFT_URL", "http://127.0.0.1:1")
        assert main(["status", "--url", f"http://127.0.0.1:{port}"]) == 0
        header, line = capsys.readouterr().out.splitlines()
        assert header.startswith("id")
        assert line.split()[:8] == ["p0", "prefill", "ready", "100", "101,102", "127.0.0.1:4000", "3", "40/50"]
        rows.clear()
        assert main(["status", "--url", f"http://127.0.0.1:{port}"]) == 0
        assert capsys.readouterr().out == "no workers\n"
    assert main(["status"]) == 1
    assert "http://127.0.0.1:1" in capsys.readouterr().err


def test_another_server_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with served_in_thread(JSONResponse([])) as port:
        assert main(["status", "--url", f"http://127.0.0.1:{port}"]) == 1
    assert "is this a PreFT server?" in capsys.readouterr().err
