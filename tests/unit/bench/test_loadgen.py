"""The load generator's bench: its server without a model, its figures, its comparison with vLLM's client."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import loadgen
from bench.loadgen import PACES, Agreement, Figure, main, measure_speed, stub_server
from preft_loadgen.errors import LoadgenError
from preft_loadgen.traffic.request import Request
from preft_loadgen.transport.server import Models, open_server


async def test_the_stub_streams_as_an_engine_does() -> None:
    with stub_server(0.01) as url:
        async with open_server(url) as server:
            assert await server.models() == Models("stub", ())
            for _ in range(2):  # over one connection
                reply = await server.send(Request("stub", (1, 2, 3), 5))
    assert (reply.tokens, reply.prompt_tokens, len(reply.arrivals)) == (5, 3, 5)
    assert reply.arrivals[-1] - reply.arrivals[0] > 0.03


def test_the_client_is_faster_than_its_bar() -> None:
    figures = measure_speed(1, 16_384)
    assert [one.what for one in figures] == list(PACES)
    assert figures[1].by_cpu > loadgen.BAR  # the other one is a measurement for a quiet machine
    assert figures[0].itl_p50 >= 0.019


def test_results_are_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    figures = [Figure("a", 1000.0, 30_000.0, 0.02), Figure("b", 1000.0, 10_000.0, 0.02)]
    monkeypatch.setattr(loadgen, "measure_speed", lambda rounds, tokens: figures)
    assert main(["--out", str(tmp_path)]) == 1
    (path,) = tmp_path.iterdir()
    assert [one["ratio"] for one in json.loads(path.read_text())["figures"]] == [1.5, 0.5]
    assert "of the bar" in capsys.readouterr().out


def test_agreement_with_vllms_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's client needs many seconds to start; here a fake one has its figures."""

    def fake(url: str, model: str, tokenizer: Path, requests: int, folder: Path) -> dict[str, Any]:
        return {"output_throughput": 1.0, "median_ttft_ms": 1e6, "median_tpot_ms": 1e6}

    monkeypatch.setattr(loadgen, "vllm_bench", fake)
    with stub_server(0.0) as url:
        flags = ["--against-vllm", "--url", url, "--tokenizer", str(tmp_path), "--rounds", "2", "--tokens", "2000"]
        assert main([*flags, "--out", str(tmp_path)]) == 1
    (path,) = tmp_path.iterdir()
    speed, ttft, _ = json.loads(path.read_text())["figures"]
    assert (len(speed["ours"]), len(speed["vllm"])) == (2, 2)
    assert speed["ratio"] > 1000
    assert ttft["ratio"] < 0.1
    assert Agreement("x", (1.0, 2.0, 3.0), (1.0, 1.0, 1.0)).ratio == 2.0


def test_a_client_of_vllm_that_fails_shows_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loadgen, "VLLM", "raise SystemExit('no room')")
    with pytest.raises(LoadgenError, match="no room"):
        loadgen.vllm_bench("http://x", "m", tmp_path, 1, tmp_path)


def test_a_server_that_fails_is_one_sentence(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    flags = ["--against-vllm", "--url", "http://127.0.0.1:9", "--tokenizer", str(tmp_path), "--out", str(tmp_path)]
    assert main(flags) == 1
    assert capsys.readouterr().err.startswith("bench: ")
    with pytest.raises(SystemExit):
        main(["--url", "http://x"])
