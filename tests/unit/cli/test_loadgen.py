"""`preft loadgen` from flags to tables and files, against a scripted server."""

from __future__ import annotations

import asyncio
import csv
import json
import os
from collections.abc import Iterator
from pathlib import Path
from threading import Event, Thread

import pytest

from preft.cli import main
from unit.loadgen.sse_server import DONE, HEAD, Call, chunk, fake_server, json_reply, tokens, usage

MODELS = {"data": [{"id": "base", "parent": None}, {"id": "a", "parent": "base"}, {"id": "b", "parent": "base"}]}
FAST = ("--requests", "6", "--prompt-tokens", "3", "--output-tokens", "2-4")


async def serve(call: Call) -> None:
    if call.path == "/v1/models":
        await call.write(json_reply("200 OK", MODELS))
    elif call.path == "/v1/chat/completions":
        said = json.dumps(
            {"choices": [{"index": 0, "delta": {"content": call.body["model"]}, "finish_reason": "stop"}]}
        )
        end = chunk(b"data: " + said.encode() + b"\n\n" + usage(call.body["max_tokens"]) + DONE)
        await call.write(HEAD + end + b"0\r\n\r\n")
    elif call.body["model"] == "b":
        await call.write(json_reply("503 Service Unavailable", {"error": {"message": "no worker"}}))
    else:
        await tokens(call)


@pytest.fixture
def calls() -> list[Call]:
    return []


@pytest.fixture
def url(calls: list[Call]) -> Iterator[str]:
    ready, urls, ends = Event(), [], []

    async def run() -> None:
        end = asyncio.Event()
        async with fake_server(serve, calls) as url:
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


def test_a_table_and_files(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    json_file, csv_file = tmp_path / "figures.json", tmp_path / "requests.csv"
    files = ("--json", str(json_file), "--csv", str(csv_file), "--slo", "ttft=10s")
    assert main(["loadgen", "--url", url, "--adapter-counts", "0,1", "--api-key", "sk-1", *FAST, *files]) == 0
    out, err = capsys.readouterr()
    assert [line.split()[0] for line in out.splitlines()] == ["adapters", "base", "1"]
    assert out.splitlines()[0].split()[-1] == "good"
    assert err == ""
    figures = json.loads(json_file.read_text())
    assert [run["requests"] for run in figures["runs"]] == [6, 6]
    assert figures["load"]["output_tokens"] == "2-4"
    assert figures["runs"][0]["tokens_per_s"] > 0
    assert "sk-1" not in json_file.read_text()
    with csv_file.open(newline="") as lines:
        assert [line["model"] for line in csv.DictReader(lines)] == ["base"] * 6 + ["a"] * 6


def test_json_on_stdout_and_a_forced_bar(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--rate", "500", "--adapters", "a", "--json", "-", "--progress")
    assert main(["loadgen", "--url", url, *FAST, *flags]) == 0
    out, err = capsys.readouterr()
    (run,) = json.loads(out)["runs"]
    assert (run["adapters"], run["by_adapter"][0]["model"]) == (1, "a")
    assert run["rate"]["planned"] > 0
    assert "1 adapter" in err
    assert "6/6" in err


def test_failed_requests_are_status_1(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["loadgen", "--url", url, *FAST]) == 1  # all adapters that are served
    out, err = capsys.readouterr()
    assert out.splitlines()[1].split()[-1] == "3"
    assert err == "preft: 2 adapters: 3 of 6 requests failed (3 x http 503); the first: 503: no worker\n"


def test_chats_and_verification(url: str, calls: list[Call], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["loadgen", "--url", url, *FAST, "--api", "chat", "--verify", "--no-warm-up"]) == 0
    assert "wrong adapter" in capsys.readouterr().out
    chats = [call.body for call in calls if call.path == "/v1/chat/completions"]
    assert len(chats) == 3 * 2 + 6  # a calm pass of two probes over base, a and b; then the load
    assert len(chats[0]["messages"][0]["content"].split()) == 3


def test_conversations_traces_and_cancels(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"timestamp": 5, "input_length": 3, "output_length": 2, "adapter": "base"}\n' * 4)
    common = ("loadgen", "--url", url, "--adapters", "a", "--json", "-")
    assert main([*common, "--trace", str(trace), "--trace-speed", "9", "--requests", "3"]) == 0
    assert json.loads(capsys.readouterr().out)["runs"][0]["requests"] == 3
    assert main([*common, *FAST, "--api", "chat", "--turns", "2"]) == 0
    assert json.loads(capsys.readouterr().out)["runs"][0]["requests"] == 12
    assert main([*common, *FAST, "--cancel", "1", "--shared-prefix", "0.5,2", "--choice", "zipf:2"]) == 0
    assert json.loads(capsys.readouterr().out)["runs"][0]["cancelled"] == 6


def test_prompts_from_a_dataset(url: str, calls: list[Call], tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "how are you?"}, {"from": "gpt", "value": "well, and you?"}]
    dataset = tmp_path / "chats.json"
    dataset.write_text(json.dumps([{"conversations": turns}]))
    common = ("loadgen", "--url", url, "--adapters", "a", "--requests", "2", "--dataset", str(dataset), "--no-warm-up")
    assert main([*common, "--api", "chat"]) == 0
    assert main([*common, "--stop-at-eos", "--output-tokens", "2"]) == 0
    first, last = calls[1].body, calls[-1].body
    assert (first["messages"], first["max_tokens"]) == ([{"role": "user", "content": "how are you?"}], 3)
    assert (last["prompt"], last["max_tokens"], "ignore_eos" in last) == ("how are you?", 2, False)


def test_saturation(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--saturate", "--adapter-counts", "1", "--arrivals", "constant", "--no-warm-up")
    assert main(["loadgen", "--url", url, *FAST, *flags]) == 0
    assert "sustained" in capsys.readouterr().out.splitlines()[-1]


def test_comparison(
    url: str, calls: list[Call], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("THEIR_KEY", "sk-2")
    monkeypatch.setenv("PREFT_API_KEY", "sk-ours")
    targets = ("--target", f"ours={url}", "--target", f"theirs={url}/v1", "--target-key", "theirs=env:THEIR_KEY")
    file = tmp_path / "x.json"
    counts = ("--rounds", "2", "--adapter-counts", "0,1", "--json", str(file))
    assert main(["loadgen", "compare", *targets, *counts, *FAST]) == 0
    out = capsys.readouterr().out
    assert "theirs has" in out
    assert "95% range" in out
    assert {call.headers.get("authorization") for call in calls} == {
        None,
        "Bearer sk-2",
    }  # no key goes to another target
    figures = json.loads(file.read_text())
    assert [len(one["rounds"]) for one in figures["ratios"]] == [2, 2]
    assert "sk-2" not in file.read_text()


def test_make_adapters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    (tmp_path / "config.json").write_text(json.dumps(config))
    flags = ("--count", "3", "--kind", "loreft", "--rank", "2", "--seed", "5")
    command = ["loadgen", "make-adapters", "--model", str(tmp_path), "--out", str(tmp_path / "out")]
    assert main([*command, *flags]) == 0
    assert sorted(os.listdir(tmp_path / "out")) == ["loreft-0000", "loreft-0001", "loreft-0002"]
    assert "3 adapters are in" in capsys.readouterr().out
    assert main([*command, "--rank", "99"]) == 1
    assert "rank" in capsys.readouterr().err


WRONG = [
    ("--adapter-counts", "3"),
    ("--adapters", "a", "--adapter-counts", "2"),
    ("--prompt-tokens", "0"),
    ("--rate", "0"),
    ("--rate", "5", "--arrivals", "often"),
    ("--arrivals", "poisson"),
    ("--url", "ftp://x"),
    ("--url", "http://127.0.0.1:9"),
    ("--json", "/no/such/f"),
    ("--png", "/no/such/f"),
    ("--choice", "best"),
    ("--slo", "ttft"),
    ("--turns", "0"),
    ("--cancel", "2"),
    ("--shared-prefix", "x"),
    ("--shared-prefix", "2"),
    ("--trace", "/no/such/f"),
    ("--trace-speed", "2"),
    ("--dataset", "/no/such/f"),
    ("--dataset", "/x", "--prompt-tokens", "5"),
    ("--tokenizer", "/no/such/f"),
    ("--vocabulary", "2"),
    ("--vocabulary", "900", "--api", "chat"),
    ("--churn", "1"),
    ("--churn", "1", "--churn-from", "/no/such/f"),
    ("--churn", "1", "--churn-from", "/", "--adapter-counts", "0"),
    ("--verify", "--turns", "2"),
    ("--timeout", "0"),
    ("--timeout", "nan"),
    ("--url", "grpc://127.0.0.1:9", "--api", "chat"),
    ("--url", "grpc://127.0.0.1"),
]


@pytest.mark.parametrize("flags", WRONG, ids=" ".join)
def test_what_cannot_be_measured_is_one_sentence(
    url: str, flags: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    fast = [flag for flag in FAST if "--dataset" not in flags or flag not in ("--prompt-tokens", "3")]
    assert main(["loadgen", "--url", url, *fast, *flags]) == 1
    err = capsys.readouterr().err
    assert err.startswith("preft: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "flags",
    [
        *(("--adapter-counts", "x"), ("--adapter-counts", "-1"), ("--adapter-counts", "1,1"), ("--requests", "0")),
        *(("--concurrency", "a"), ("--adapters", "a,,b"), ("--adapters", "a,a"), ("--concurrency", "1", "--rate", "2")),
        *(("--saturate", "--rate", "2"), ("--requests", "5", "compare", "--target", "a=b"), ("--requests", "9" * 30)),
        *(("compare",), ("compare", "--target", "x"), ("make-adapters", "--kind", "x"), ("unknown",)),
    ],
    ids=" ".join,
)
def test_wrong_usage(flags: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["loadgen", *flags])
    assert stop.value.code == 2


@pytest.mark.parametrize(
    "flags",
    [
        ("--target", "a=http://x"),
        ("--target", "a=http://x", "--target", "a=http://y"),
        ("--target", "a=http://x", "--target", "b=http://y", "--target-key", "c=k"),
        ("--target", "a=http://x", "--target", "b=http://y", "--target-key", "b=env:NOT_SET"),
        ("--target", "a=http://x", "--target", "b=nowhere"),
    ],
    ids=" ".join,
)
def test_comparisons_that_are_none(flags: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["loadgen", "compare", *flags]) == 1
    assert capsys.readouterr().err.count("\n") == 1
