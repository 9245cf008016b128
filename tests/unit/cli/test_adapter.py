"""`preft adapter`: the four verbs against an HTTP server that answers like the gateway."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest
from fastapi import FastAPI

from preft.cli import main
from preft.gateway.deps import GatewayDeps
from preft.gateway.routes_models import adapter_routes
from support.fakes import FakeCatalog

ALICE: dict[str, Any] = {"name": "alice", "digest": "ab" * 32, "source": "/adapters/alice", "kind": "lora", "rank": 8}
ALICE |= {"prefill_only": True}


@dataclass
class FakeGateway:
    """What the server was asked, and what it answers: (status, body) by method and path."""

    url: str = ""
    answers: dict[tuple[str, str], tuple[int, bytes]] = field(default_factory=dict)
    asked: list[tuple[str, str, Any]] = field(default_factory=list)


@pytest.fixture
def gateway(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGateway]:
    fake = FakeGateway()

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            fake.asked.append((self.command, self.path, json.loads(body) if body else None))
            status, reply = fake.answers[self.command, self.path]
            self.send_response(status)
            self.send_header("Content-Length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

        do_GET = do_POST = do_DELETE = answer

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    fake.url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("PREFT_URL", fake.url)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # nobody listens: a proxy must not be asked
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    yield fake
    server.shutdown()
    thread.join()
    server.server_close()


def encoded(body: Any) -> bytes:
    return json.dumps(body).encode()


def test_add_sends_the_absolute_folder(
    gateway: FakeGateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "alice").mkdir()
    monkeypatch.chdir(tmp_path)
    gateway.answers["POST", "/v1/adapters"] = (200, encoded(ALICE))
    assert main(["adapter", "add", "alice", "alice", "--replace"]) == 0
    body = {"name": "alice", "path": str(tmp_path / "alice"), "replace": True}
    assert gateway.asked == [("POST", "/v1/adapters", body)]
    said = capsys.readouterr()
    assert "alice is served now" in said.out
    assert said.err == ""


def test_add_warns_of_adapters_that_may_be_for_all_tokens(
    gateway: FakeGateway, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gateway.answers["POST", "/v1/adapters"] = (200, encoded({**ALICE, "prefill_only": False}))
    assert main(["adapter", "add", "alice", str(tmp_path)]) == 0
    said = capsys.readouterr()
    assert "alice is served now" in said.out
    assert "warning: alice: its configuration doesn't say" in said.err


def test_add_refuses_a_folder_that_is_not_there(gateway: FakeGateway, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["adapter", "add", "alice", "/no/such/folder"]) == 1
    assert "/no/such/folder is not a folder" in capsys.readouterr().err
    assert gateway.asked == []


def test_the_servers_own_sentence_is_shown(
    gateway: FakeGateway, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = {"error": {"message": "alice: rank 512 is above the limit of 64", "type": "invalid_request_error"}}
    gateway.answers["POST", "/v1/adapters"] = (400, encoded(error))
    assert main(["adapter", "add", "alice", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "preft: alice: rank 512 is above the limit of 64\n"


@pytest.mark.parametrize("body", [b"<html>", b"[]", b'{"error": "no"}', b""])
def test_a_foreign_error_body_shows_the_status(
    gateway: FakeGateway, body: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    gateway.answers["GET", "/v1/adapters"] = (502, body)
    assert main(["adapter", "list"]) == 1
    assert capsys.readouterr().err == "preft: the server answered 502 Bad Gateway\n"


def test_list_as_table_and_as_json(gateway: FakeGateway, capsys: pytest.CaptureFixture[str]) -> None:
    gateway.answers["GET", "/v1/adapters"] = (200, encoded({"object": "list", "data": [ALICE]}))
    assert main(["adapter", "list"]) == 0
    header, row = capsys.readouterr().out.splitlines()
    assert header.split() == ["name", "kind", "rank", "digest", "source"]
    assert row.split() == ["alice", "lora", "8", "abababababab", "/adapters/alice"]
    assert main(["adapter", "list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [ALICE]


def test_an_empty_catalog_says_so(gateway: FakeGateway, capsys: pytest.CaptureFixture[str]) -> None:
    gateway.answers["GET", "/v1/adapters"] = (200, encoded({"data": []}))
    assert main(["adapter", "list"]) == 0
    assert capsys.readouterr().out == "no adapters\n"


def test_show(gateway: FakeGateway, capsys: pytest.CaptureFixture[str]) -> None:
    gateway.answers["GET", "/v1/adapters"] = (200, encoded({"data": [ALICE]}))
    assert main(["adapter", "show", "alice"]) == 0
    assert f"digest: {ALICE['digest']}" in capsys.readouterr().out.splitlines()
    assert main(["adapter", "show", "alice", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == ALICE
    assert main(["adapter", "show", "bob"]) == 1
    assert "no adapter 'bob'" in capsys.readouterr().err


def test_remove_quotes_the_name(gateway: FakeGateway, capsys: pytest.CaptureFixture[str]) -> None:
    gateway.answers["DELETE", "/v1/adapters/team%2Falice"] = (200, encoded({**ALICE, "name": "team/alice"}))
    assert main(["adapter", "remove", "team/alice"]) == 0
    assert "team/alice is no longer served" in capsys.readouterr().out


async def test_the_real_gateway_speaks_the_same_language() -> None:
    """The fake above is only worth something if the real routes take and give the same."""
    deps = SimpleNamespace(catalog=FakeCatalog(), max_body_bytes=1 << 20)
    app = FastAPI()
    app.include_router(adapter_routes(cast(GatewayDeps, deps)))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway") as client:
        body = {"name": "team/alice", "path": "/adapters/alice", "replace": True}
        added = (await client.post("/v1/adapters", json=body)).json()
        assert added.keys() >= ALICE.keys()
        assert (await client.get("/v1/adapters")).json()["data"] == [added]
        assert (await client.delete("/v1/adapters/team%2Falice")).json()["name"] == "team/alice"


def test_url_flag_wins_over_the_environment(gateway: FakeGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    gateway.answers["GET", "/v1/adapters"] = (200, encoded({"data": []}))
    monkeypatch.setenv("PREFT_URL", "http://127.0.0.1:9")
    assert main(["adapter", "list", "--url", gateway.url + "/"]) == 0


@pytest.mark.parametrize(
    ("url", "part"),
    [
        ("http://127.0.0.1:9", "no server answers at http://127.0.0.1:9"),
        ("http://127.0.0.1:port", "no server answers"),
        ("127.0.0.1:8000", "must start with http://"),
        ("file:///etc/passwd", "must start with http://"),
    ],
)
def test_nobody_there(url: str, part: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["adapter", "list", "--url", url]) == 1
    assert part in capsys.readouterr().err


def test_an_answer_that_is_not_json(gateway: FakeGateway, capsys: pytest.CaptureFixture[str]) -> None:
    gateway.answers["GET", "/v1/adapters"] = (200, b"<html>hello</html>")
    assert main(["adapter", "list"]) == 1
    assert "is this a PreFT server?" in capsys.readouterr().err
