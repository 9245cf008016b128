"""`preft loadgen` from flags to table, against a scripted server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from threading import Event, Thread

import pytest

from preft.cli import main
from unit.loadgen.sse_server import Call, fake_server, json_reply, tokens

MODELS = {"data": [{"id": "base", "parent": None}, {"id": "a", "parent": "base"}, {"id": "b", "parent": "base"}]}
FAST = ("--requests", "6", "--prompt-tokens", "3", "--output-tokens", "2-4")


async def serve(call: Call) -> None:
    if call.path == "/v1/models":
        await call.write(json_reply("200 OK", MODELS))
    elif call.body["model"] == "b":
        await call.write(json_reply("503 Service Unavailable", {"error": {"message": "no worker"}}))
    else:
        await tokens(call)


@pytest.fixture
def url() -> Iterator[str]:
    ready, urls, ends = Event(), [], []

    async def run() -> None:
        end = asyncio.Event()
        async with fake_server(serve) as url:
            urls.append(url)
            ends.append((asyncio.get_running_loop(), end))
            ready.set()
            await end.wait()

    thread = Thread(target=asyncio.run, args=(run(),))
    thread.start()
    ready.wait(10)
    yield urls[0]
    loop, end = ends[0]
    loop.call_soon_threadsafe(end.set)
    thread.join()


def test_a_table_and_a_file(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "figures.json"
    assert main(["loadgen", "--url", url, "--adapters", "0,1", *FAST, "--json", str(file)]) == 0
    out, err = capsys.readouterr()
    assert [line.split()[0] for line in out.splitlines()] == ["adapters", "base", "1"]
    assert err == ""
    figures = json.loads(file.read_text())
    assert [run["requests"] for run in figures["runs"]] == [6, 6]
    assert figures["sweep"]["output"] == {"low": 2, "high": 4}


def test_json_on_stdout_and_a_forced_bar(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["loadgen", "--url", url, "--rate", "500", *FAST, "--json", "-", "--progress"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["runs"][0]["adapters"] == 1
    assert "1 adapter" in err
    assert "6/6" in err


def test_failed_requests_are_status_1(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["loadgen", "--url", url, "--adapters", "2", *FAST]) == 1
    out, err = capsys.readouterr()
    assert out.splitlines()[1].split()[-1] == "3"
    assert err == "preft: 3 requests failed, the first with: 503: no worker\n"


@pytest.mark.parametrize(
    "flags",
    [("--adapters", "3"), ("--prompt-tokens", "0"), ("--rate", "0"), ("--url", "https://x"), ("--json", "/no/such/f")],
)
def test_what_cannot_be_measured_is_one_sentence(
    url: str, flags: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["loadgen", "--url", url, *FAST, *flags]) == 1
    err = capsys.readouterr().err
    assert err.startswith("preft: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "flags", [("--adapters", "x"), ("--adapters", "-1"), ("--requests", "0"), ("--concurrency", "a")]
)
def test_wrong_usage(flags: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["loadgen", *flags])
    assert stop.value.code == 2
