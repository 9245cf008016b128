"""`preft adapter` against the real HTTP API over a catalog in memory, and against servers that answer strangely."""

from __future__ import annotations

import dataclasses
import io
import json
import sys
import tarfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast

import pytest

from preft.cli import main
from preft.cli.packing import Package
from preft.core.cluster import Adapter, AdapterPlace, AdapterState
from preft.core.errors import InvalidAdapter, Unavailable
from preft.gateway.deps import GatewayDeps
from preft.gateway.http.app import create_app
from preft.gateway.text.tokenizer import Tokenizer
from support.fakes import FakeCatalog, FakeGenerator, Script
from support.served_app import served_in_thread

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # nobody listens: a proxy must not be asked
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)


@pytest.fixture
def places() -> list[AdapterPlace]:
    """The workers that have any of the adapters in memory."""
    return []


@pytest.fixture
def catalog(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, places: list[AdapterPlace]) -> Iterator[FakeCatalog]:
    """What the server at PREFT_URL serves."""
    catalog = FakeCatalog()
    generator = FakeGenerator(lambda request: Script())
    deps = GatewayDeps(
        "base",
        cast(Tokenizer, None),
        64,
        generator,
        catalog,
        max_adapter_bytes=1 << 20,
        upload_folder=tmp_path / "uploads",
        places=lambda digest: places,
    )
    with served_in_thread(create_app(deps)) as port:
        monkeypatch.setenv("PREFT_URL", f"http://127.0.0.1:{port}")
        yield catalog


def lora_folder(parent: Path, name: str, weights: bytes = b"weights") -> Path:
    """Has an adapter's files by name, with other content, and one that isn't the adapter's."""
    folder = parent / name
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({"r": 8, "name": name}))
    (folder / "adapter_model.safetensors").write_bytes(weights)
    (folder / "optimizer.pt").write_bytes(b"not for serving")
    return folder


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_add_sends_the_absolute_folder(
    catalog: FakeCatalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    (tmp_path / "alice").mkdir()
    monkeypatch.chdir(tmp_path)
    assert main(["adapter", "add", "team/alice", "alice"]) == 0
    entry = catalog.get("team/alice")
    assert entry is not None
    assert entry.source == str(tmp_path / "alice")
    said = capsys.readouterr()
    assert said.out == f"team/alice is served now (digest {entry.digest[:12]})\n"
    assert said.err == "warning: team/alice: it is fake\n"
    assert main(["adapter", "add", "team/alice", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "preft: 'team/alice' is another adapter already\n"
    assert main(["adapter", "add", "team/alice", str(tmp_path), "--replace", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["version"] == 2


def test_add_is_silent_where_there_is_nothing_to_warn_of(catalog: FakeCatalog, capsys: Capture) -> None:
    assert main(["adapter", "add", "alice", "s3://adapters/alice"]) == 0
    entry = catalog.get("alice")
    assert entry is not None
    assert entry.source == "s3://adapters/alice"
    capsys.readouterr()
    catalog.put(dataclasses.replace(entry, warnings=()))
    assert main(["adapter", "add", "alice", "s3://adapters/alice"]) == 0
    assert capsys.readouterr().err == ""


def test_add_refuses_a_folder_that_is_not_there(catalog: FakeCatalog, capsys: Capture) -> None:
    assert main(["adapter", "add", "alice", "/no/such/folder"]) == 1
    assert "/no/such/folder is not a folder" in capsys.readouterr().err
    assert catalog.get("alice") is None


@pytest.mark.parametrize(
    ("steps", "failure", "sentence"),
    [
        ([], InvalidAdapter("rank 512 is above the limit of 64"), "rank 512 is above the limit of 64"),
        ([(1, 2)], Unavailable("the bucket doesn't answer"), "the bucket doesn't answer"),
        ([(1, 2)], ValueError("a bug"), "The server met an unexpected error."),
    ],
)
def test_an_add_that_fails_says_why(
    catalog: FakeCatalog, capsys: Capture, steps: list[tuple[int, int]], failure: Exception, sentence: str
) -> None:
    catalog.steps, catalog.fail = steps, failure
    assert main(["adapter", "add", "alice", "s3://adapters/alice"]) == 1
    assert capsys.readouterr().err == f"preft: {sentence}\n"


def test_bars_only_on_a_terminal(
    catalog: FakeCatalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    catalog.steps = [(3 << 20, 5 << 20), (5 << 20, 5 << 20)]
    assert main(["adapter", "add", "alice", "s3://adapters/alice"]) == 0
    assert "MB" not in capsys.readouterr().err
    for argv, shown in [
        (["alice", "s3://adapters/alice"], ("alice:", "100%", "5.00M/5.00M")),
        (["bob", str(lora_folder(tmp_path / "up", "bob", bytes(100_000))), "--upload"], ("bob:", "100%")),
        (["--all", str(tmp_path / "up")], ("adding:", "1/1", "adapter")),
    ]:
        terminal = Terminal()
        monkeypatch.setattr(sys, "stderr", terminal)
        main(["adapter", "add", *argv])
        assert all(part in terminal.getvalue() for part in shown), terminal.getvalue()


def test_upload_sends_the_adapters_files_alone(catalog: FakeCatalog, tmp_path: Path, capsys: Capture) -> None:
    folder = lora_folder(tmp_path, "alice", weights=bytes(range(256)) * 2000)
    assert main(["adapter", "add", "team/alice", str(folder), "--upload"]) == 0
    assert "team/alice is served now" in capsys.readouterr().out
    with tarfile.open(fileobj=io.BytesIO(catalog.archives["team/alice"])) as archive:
        assert archive.getnames() == ["adapter_config.json", "adapter_model.safetensors"]
        for member in archive:
            content = archive.extractfile(member)
            assert content is not None
            assert content.read() == (folder / member.name).read_bytes()
    assert list((tmp_path / "uploads").iterdir()) == []
    (folder / "adapter_config.json").write_text("{}")
    assert main(["adapter", "add", "team/alice", str(folder), "--upload"]) == 1
    assert main(["adapter", "add", "team/alice", str(folder), "--upload", "--replace"]) == 0


@pytest.mark.parametrize("size", [0, 1, 511, 512, 513])
def test_the_size_of_a_package_is_known_before_it_is_made(tmp_path: Path, size: int) -> None:
    package = Package.of(lora_folder(tmp_path, "alice", bytes(size)))
    assert len(b"".join(package)) == package.size


def test_uploads_that_cannot_be(catalog: FakeCatalog, tmp_path: Path, capsys: Capture) -> None:
    folder = lora_folder(tmp_path, "large", bytes(2 << 20))
    assert main(["adapter", "add", "large", str(folder), "--upload"]) == 1
    assert capsys.readouterr().err == f"preft: The request body is larger than {1 << 20} bytes.\n"
    (folder / "adapter_model.safetensors").unlink()
    assert main(["adapter", "add", "large", str(folder), "--upload"]) == 1
    assert "adapter_model.safetensors is missing" in capsys.readouterr().err
    assert main(["adapter", "add", "large", "s3://adapters/large", "--upload"]) == 1
    assert "leave it out" in capsys.readouterr().err
    assert catalog.list() == ()


def test_a_file_that_shrinks_while_it_is_sent_adds_nothing(
    catalog: FakeCatalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    folder = lora_folder(tmp_path, "alice", bytes(600_000))
    shrunk = dataclasses.replace(
        Package.of(folder), files=(("adapter_config.json", 5), ("adapter_model.safetensors", 700_000))
    )
    monkeypatch.setattr(Package, "of", lambda folder: shrunk)
    assert main(["adapter", "add", "alice", str(folder), "--upload"]) == 1
    assert "became shorter" in capsys.readouterr().err
    assert catalog.get("alice") is None


@pytest.mark.parametrize("upload", [False, True])
def test_add_all(catalog: FakeCatalog, tmp_path: Path, capsys: Capture, upload: bool) -> None:
    root = tmp_path / "adapters"
    for i in range(20):
        lora_folder(root, f"user-{i:02}")
    (root / ".cache").mkdir()
    (root / "readme.txt").write_text("not an adapter")
    argv = ["adapter", "add", "--all", str(root), *(["--upload"] if upload else [])]
    assert main(argv) == 0
    said = capsys.readouterr()
    assert said.out == "20 of 20 adapters are served now\n"
    assert said.err == "warning: user-00 and 19 others: it is fake\n"
    assert [entry.name for entry in catalog.list()] == [f"user-{i:02}" for i in range(20)]
    assert len(catalog.archives) == (20 if upload else 0)
    assert main([*argv, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [entry["name"] for entry in shown["added"]] == [f"user-{i:02}" for i in range(20)]
    assert shown["failed"] == []


def test_add_all_goes_on_after_failures(catalog: FakeCatalog, tmp_path: Path, capsys: Capture) -> None:
    for name in ("ann", "base", "bob", "broken", "carol"):
        lora_folder(tmp_path / "adapters", name)
    catalog.put(Adapter("bob", "d", "/elsewhere", 8))
    argv = ["adapter", "add", "--all", str(tmp_path / "adapters")]
    assert main(argv) == 1
    said = capsys.readouterr()
    assert said.out == "2 of 5 adapters are served now\n"
    assert [line.split(": ")[:2] for line in said.err.splitlines() if "failed" in line] == [
        ["failed", "base"],
        ["failed", "bob"],
        ["failed", "broken"],
    ]
    assert "failed: bob: 'bob' is another adapter already" in said.err
    assert main([*argv, "--replace", "--json"]) == 1
    shown = json.loads(capsys.readouterr().out)
    assert [entry["name"] for entry in shown["added"]] == ["ann", "bob", "carol"]
    assert shown["failed"][0] == {"name": "base", "error": "'base' is the base model's name"}


def test_add_all_needs_subfolders(catalog: FakeCatalog, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "empty").mkdir()
    assert main(["adapter", "add", "--all", str(tmp_path / "empty")]) == 1
    assert "has no subfolders" in capsys.readouterr().err
    assert main(["adapter", "add", "--all", str(tmp_path / "none")]) == 1
    assert "can't be read" in capsys.readouterr().err


def test_add_all_without_a_server_is_one_sentence(tmp_path: Path, capsys: Capture) -> None:
    for name in ("ann", "bob"):
        lora_folder(tmp_path, name)
    assert main(["adapter", "add", "--all", str(tmp_path), "--url", "http://127.0.0.1:9"]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert "no server answers" in said.err


@pytest.mark.parametrize("argv", [["alice"], [], ["alice", "/a", "--all", "/b"], ["alice", "--all", "/b"]])
def test_add_takes_one_source_or_all(argv: list[str], capsys: Capture) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["adapter", "add", *argv])
    assert stop.value.code == 2
    assert "--all DIR" in capsys.readouterr().err


def test_list_as_table_and_as_json(catalog: FakeCatalog, capsys: Capture) -> None:
    catalog.put(Adapter("alice", "ab" * 32, "/adapters/alice", 8, size=3_355_443, version=2, pinned=True))
    assert main(["adapter", "list"]) == 0
    header, row = capsys.readouterr().out.splitlines()
    assert header.split() == ["name", "kind", "rank", "size", "version", "pinned", "digest", "source"]
    assert row.split() == ["alice", "lora", "8", "3.2MiB", "2", "yes", "abababababab", "/adapters/alice"]
    assert main(["adapter", "list", "--json"]) == 0
    [entry] = json.loads(capsys.readouterr().out)
    assert (entry["name"], entry["digest"], entry["size"]) == ("alice", "ab" * 32, 3_355_443)


def test_list_fetches_all_pages(catalog: FakeCatalog, capsys: Capture) -> None:
    catalog.put(*(Adapter(f"user-{i:04}", "d", "/a", 8) for i in range(2345)))
    names = [f"user-{i:04}" for i in range(2345)]
    for argv, expected in [([], names), (["--limit", "1001"], names[:1001]), (["--limit", "3"], names[:3])]:
        assert main(["adapter", "list", "--json", *argv]) == 0
        assert [entry["name"] for entry in json.loads(capsys.readouterr().out)] == expected


def test_list_passes_the_filters_on(catalog: FakeCatalog, capsys: Capture) -> None:
    catalog.put(
        Adapter("team/a b", "d", "/a", 8, kind="lora+reft", pinned=True),
        Adapter("team/c", "d", "/a", 8, kind="lora+reft"),
        Adapter("other", "d", "/a", 8, pinned=True),
    )
    for argv, expected in [
        (["--search", "A B"], ["team/a b"]),
        (["--kind", "lora+reft"], ["team/a b", "team/c"]),
        (["--pinned"], ["other", "team/a b"]),
        (["--pinned", "--search", "team"], ["team/a b"]),
    ]:
        assert main(["adapter", "list", "--json", *argv]) == 0
        assert [entry["name"] for entry in json.loads(capsys.readouterr().out)] == expected


@pytest.mark.parametrize("argv", [["--limit", "0"], ["--limit", "x"], ["--kind", "dora"]])
def test_wrong_list_usage(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["adapter", "list", *argv])
    assert stop.value.code == 2


def test_an_empty_catalog_says_so(catalog: FakeCatalog, capsys: Capture) -> None:
    assert main(["adapter", "list"]) == 0
    assert capsys.readouterr().out == "no adapters\n"


def test_show(catalog: FakeCatalog, places: list[AdapterPlace], capsys: Capture) -> None:
    catalog.put(Adapter("alice", "ab" * 32, "/adapters/alice", 8, warnings=("it is old", "it is slow")))
    assert main(["adapter", "show", "alice"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"digest: {'ab' * 32}" in lines
    assert lines[-3].startswith("created: ")
    assert lines[-2:] == ["warning: it is old", "warning: it is slow"]
    places += [AdapterPlace("prefill-0", AdapterState.SLOT, 2), AdapterPlace("prefill-1", AdapterState.LOADING)]
    assert main(["adapter", "show", "alice"]) == 0
    header, first, second = capsys.readouterr().out.splitlines()[-3:]
    assert header.split() == ["worker", "state", "prompts"]
    assert first.split() == ["prefill-0", "slot", "2"]
    assert second.split() == ["prefill-1", "loading", "0"]
    assert main(["adapter", "show", "alice", "--json"]) == 0
    assert [place["state"] for place in json.loads(capsys.readouterr().out)["workers"]] == ["slot", "loading"]
    assert main(["adapter", "show", "bob"]) == 1
    assert capsys.readouterr().err == "preft: no adapter is named 'bob'\n"


def test_pin_unpin_and_remove(catalog: FakeCatalog, capsys: Capture) -> None:
    catalog.put(Adapter("team/alice", "d", "/a", 8), Adapter("big", "d", "/huge", 8))
    for verb, pinned in (("pin", True), ("unpin", False)):
        assert main(["adapter", verb, "team/alice"]) == 0
        assert "team/alice" in capsys.readouterr().out
        entry = catalog.get("team/alice")
        assert entry is not None
        assert entry.pinned is pinned
    assert main(["adapter", "pin", "big"]) == 1
    assert "unpin another adapter first" in capsys.readouterr().err
    assert main(["adapter", "remove", "team/alice"]) == 0
    assert "team/alice is no longer served" in capsys.readouterr().out
    assert catalog.get("team/alice") is None
    assert main(["adapter", "unpin", "team/alice"]) == 1
    assert "no adapter 'team/alice'" in capsys.readouterr().err


@dataclass
class FakeServer:
    """What it was asked, and what it answers: (status, content type, body) by method and path."""

    url: str = ""
    answers: dict[tuple[str, str], tuple[int, str, bytes]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    fake = FakeServer()

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            path = self.path.partition("?")[0]
            fake.asked.append(path)
            status, kind, reply = fake.answers[self.command, path]
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.end_headers()
            self.wfile.write(reply)

        do_GET = do_POST = do_DELETE = answer

        def do_PUT(self) -> None:
            self.rfile.read(1000)  # and goes away

        def log_message(self, format: str, *args: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, args=(0.01,))
    thread.start()
    fake.url = f"http://127.0.0.1:{http.server_port}"
    monkeypatch.setenv("PREFT_URL", fake.url)
    yield fake
    http.shutdown()
    thread.join()
    http.server_close()


@pytest.mark.parametrize("body", [b"<html>", b"[]", b'{"error": "no"}', b""])
def test_a_foreign_error_body_shows_the_status(server: FakeServer, body: bytes, capsys: Capture) -> None:
    server.answers["GET", "/v1/adapters"] = (502, "text/html", body)
    assert main(["adapter", "list"]) == 1
    assert capsys.readouterr().err == "preft: the server answered 502 Bad Gateway\n"


def test_url_flag_wins_over_the_environment(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.answers["GET", "/v1/adapters"] = (200, "application/json", b'{"data": [], "has_more": false}')
    monkeypatch.setenv("PREFT_URL", "http://127.0.0.1:9")
    assert main(["adapter", "list", "--url", server.url + "/"]) == 0
    assert server.asked == ["/v1/adapters"]


@pytest.mark.parametrize(
    ("url", "part"),
    [
        ("http://127.0.0.1:9", "no server answers at http://127.0.0.1:9"),
        ("http://127.0.0.1:port", "no server answers"),
        ("http://[::1", "no server answers"),
        ("127.0.0.1:8000", "must start with http://"),
        ("file:///etc/passwd", "must start with http://"),
    ],
)
def test_nobody_there(url: str, part: str, capsys: Capture) -> None:
    assert main(["adapter", "list", "--url", url]) == 1
    assert part in capsys.readouterr().err


def test_answers_of_something_else(server: FakeServer, capsys: Capture) -> None:
    server.answers["GET", "/v1/adapters"] = (200, "text/html", b"<html>hello</html>")
    server.answers["POST", "/v1/adapters"] = (200, "text/html", b"<html>hello</html>")
    for argv in (["list"], ["add", "alice", "s3://a"]):
        assert main(["adapter", *argv]) == 1
        assert "is this a PreFT server?" in capsys.readouterr().err


@pytest.mark.parametrize("body", [b"", b": still\n\n", b'data: {"bytes": 5, "total": null}\n\n', b'data: {"byt'])
def test_a_stream_that_breaks_off(server: FakeServer, body: bytes, capsys: Capture) -> None:
    server.answers["POST", "/v1/adapters"] = (200, "text/event-stream; charset=utf-8", body)
    assert main(["adapter", "add", "alice", "s3://a"]) == 1
    err = capsys.readouterr().err
    assert "broke off" in err or "didn't answer with JSON" in err
    assert err.count("\n") == 1


def test_a_server_that_leaves_during_an_upload(server: FakeServer, tmp_path: Path, capsys: Capture) -> None:
    folder = lora_folder(tmp_path, "alice", bytes(20 << 20))
    assert main(["adapter", "add", "alice", str(folder), "--upload"]) == 1
    assert "closed the connection half-way" in capsys.readouterr().err
