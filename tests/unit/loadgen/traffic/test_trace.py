"""Traces: times, lengths, shared blocks, adapters, and lines that aren't requests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from preft_loadgen.errors import InvalidArgument
from preft_loadgen.traffic.choice import RoundRobin
from preft_loadgen.traffic.prompts import Ids, Words
from preft_loadgen.traffic.trace import BLOCK_TOKENS, read_trace, replay

MODELS = ("a", "b", "c")


def trace(folder: Path, *rows: Any) -> Path:
    path = folder / "trace.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    return path


def row(timestamp: float = 0, ids: tuple[int, ...] = (), length: int = 600, **more: Any) -> dict[str, Any]:
    return {"timestamp": timestamp, "input_length": length, "output_length": 5, "hash_ids": list(ids), **more}


def test_times_and_their_speed(tmp_path: Path) -> None:
    path = trace(tmp_path, row(3000), row(1000), row(1500))
    assert [one.time for one in read_trace(path)] == [0.0, 0.5, 2.0]
    assert [one.time for one in read_trace(path, speed=4, most=2)] == [0.0, 0.125]


def test_blocks_with_equal_ids_are_equal(tmp_path: Path) -> None:
    rows = read_trace(trace(tmp_path, row(0, (7, 8)), row(1, (7, 9)), row(2, (7,), 100), row(3, (), 30)))
    requests, times = replay(rows, MODELS, RoundRobin(), Ids(50_000))
    assert [len(request.ids) for request in requests] == [600, 600, 100, 30]
    first, second, third, _ = (request.ids for request in requests)
    assert first[:BLOCK_TOKENS] == second[:BLOCK_TOKENS]
    assert first[BLOCK_TOKENS:] != second[BLOCK_TOKENS:]
    assert third == first[:100]
    assert times == pytest.approx([0, 0.001, 0.002, 0.003])
    assert [request.output_tokens for request in requests] == [5] * 4
    assert replay(rows, MODELS, RoundRobin(), Ids(50_000)) == (requests, times)
    text = replay(rows, MODELS, RoundRobin(), Words())[0][0].prompt
    assert isinstance(text, str)
    assert len(text.split()) == 600


def test_adapters_by_name_by_number_and_by_choice(tmp_path: Path) -> None:
    path = trace(tmp_path, row(0, adapter="zoe"), row(1, adapter=4), row(2), row(3, adapter=0))
    requests, _ = replay(read_trace(path), MODELS, RoundRobin(), Ids())
    assert [request.model for request in requests] == ["zoe", "b", "c", "a"]


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        "1",
        '{"timestamp": 0, "input_length": 5}',
        '{"timestamp": 0, "input_length": -1, "output_length": 2}',
        '{"timestamp": -1, "input_length": 1, "output_length": 2}',
        '{"timestamp": "x", "input_length": 1, "output_length": 2}',
        '{"input_length": true, "output_length": 2}',
        '{"input_length": 1, "output_length": 2, "hash_ids": 3}',
        '{"input_length": 1, "output_length": 2, "adapter": -1}',
        '{"input_length": 1, "output_length": 2, "adapter": ""}',
        '{"timestamp": NaN, "input_length": 1, "output_length": 2}',
        '{"input_length": 99999999999, "output_length": 2}',
    ],
)
def test_lines_that_are_no_request(tmp_path: Path, line: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(json.dumps(row()) + "\n" + line + "\n")
    with pytest.raises(InvalidArgument, match="line 2"):
        read_trace(path)


def test_files_that_are_no_trace(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x01")
    for name in ("empty", "binary", "missing"):
        with pytest.raises(InvalidArgument):
            read_trace(tmp_path / name)
    with pytest.raises(InvalidArgument, match="speed"):
        read_trace(trace(tmp_path, row()), speed=0)
