"""Recorded traffic: Mooncake's JSONL, with an optional column for the adapter.

One request a line: `{"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [46], "adapter": 3}`,
with the time in milliseconds and the lengths in tokens. Each hash id stands for a block of 512 prompt tokens; equal ids
mean equal tokens, so shared prefixes come back. `adapter` is a model's name, or a number: the k-th adapter, from 0,
modulo their count. Without it the load's own choice decides.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preft_loadgen.errors import InvalidArgument
from preft_loadgen.traffic.choice import Choice
from preft_loadgen.traffic.lengths import MOST
from preft_loadgen.traffic.prompts import Material
from preft_loadgen.traffic.request import Request

BLOCK_TOKENS = 512


@dataclass(frozen=True, slots=True)
class Row:
    """One recorded request. `time` in seconds after the first one; lengths in tokens."""

    time: float
    input_length: int
    output_length: int
    hash_ids: tuple[int, ...] = ()
    adapter: str | int | None = None


def read_trace(path: Path, *, speed: float = 1.0, most: int | None = None) -> list[Row]:
    """The first `most` rows in the order of their times, `speed` times as fast as recorded. Raises InvalidArgument."""
    if not 0 < speed <= 1e6:
        raise InvalidArgument(f"the speed of a trace must be more than 0, not {speed:g}")
    rows: list[Row] = []
    try:
        with path.open() as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    rows.append(_row(line, f"{path}, line {number}"))
    except OSError as error:
        raise InvalidArgument(f"{path} can't be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InvalidArgument(f"{path} isn't a trace: it isn't text") from error
    if not rows:
        raise InvalidArgument(f"{path} holds no request")
    rows.sort(key=lambda row: row.time)
    first = rows[0].time
    return [
        Row((row.time - first) / speed, row.input_length, row.output_length, row.hash_ids, row.adapter)
        for row in rows[:most]
    ]


def replay(
    rows: Sequence[Row], models: Sequence[str], choice: Choice, material: Material, *, exact: bool = True, seed: int = 0
) -> tuple[list[Request], list[float]]:
    """The requests and their times, in seconds after the start."""
    source = random.Random(f"trace {seed}")
    requests = []
    for row, chosen in zip(rows, choice.draw(models, len(rows), source), strict=True):
        model = models[row.adapter % len(models)] if isinstance(row.adapter, int) else row.adapter or chosen
        requests.append(Request(model, material.join(_tokens(row, material, source, seed)), row.output_length, exact))
    return requests, [row.time for row in rows]


def _tokens(row: Row, material: Material, source: random.Random, seed: int) -> list[Any]:
    tokens: list[Any] = []
    for block in row.hash_ids[: -(-row.input_length // BLOCK_TOKENS)]:
        tokens += material.draw(BLOCK_TOKENS, random.Random(f"block {seed} {block}"))
    own = max(0, row.input_length - len(tokens))
    return tokens[: row.input_length] + material.draw(own, source)


def _row(line: str, where: str) -> Row:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise InvalidArgument(f"{where} isn't JSON: {error}") from error
    if not isinstance(row, dict):
        raise InvalidArgument(f"{where} isn't a JSON object")

    def length(name: str) -> int:
        value = row.get(name)
        if type(value) is not int or not 0 <= value <= MOST:
            raise InvalidArgument(f"{where}: {name} must be a number of tokens, not {value!r}")
        return max(1, value)

    time, ids, adapter = row.get("timestamp", 0), row.get("hash_ids") or [], row.get("adapter")
    if type(time) not in (int, float) or not 0 <= time < 1e15:
        raise InvalidArgument(f"{where}: timestamp must be milliseconds from 0 up, not {time!r}")
    if not isinstance(ids, list) or not all(type(one) in (int, str) for one in ids):
        raise InvalidArgument(f"{where}: hash_ids must be a list of numbers")
    if adapter is not None and (
        type(adapter) not in (int, str) or adapter == "" or (type(adapter) is int and adapter < 0)
    ):
        raise InvalidArgument(f"{where}: adapter must be a name or a number from 0 up, not {adapter!r}")
    return Row(time / 1000, length("input_length"), length("output_length"), tuple(ids), adapter)
