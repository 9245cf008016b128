"""The tables of docs/api-fields.md: what the server does with each field of a request, by route."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[2] / "docs" / "api-fields.md"
ANSWERS = {"works", "no effect", "refused"}
_ROW = re.compile(r"\| `(\w+)` \| ([a-z ]+) \| (`.+`) \| (.*)\|")
_MORE = re.compile(r"`(\w+): (.+?)`")
_MESSAGE = re.compile(r'^"(.+?)"(?: Accepted: .+)?\s*$')


@dataclass(frozen=True, slots=True)
class Row:
    """One example of a field. `message` is the refusal's; `neutral` are values that are accepted all the same."""

    path: str
    field: str
    answer: str
    example: Any
    beside: dict[str, Any]
    message: str = ""
    neutral: tuple[Any, ...] = ()
    remark: str = ""


def rows() -> list[Row]:
    """Every row of the page, in its order. Raises ValueError for a row that can't be read."""
    found: list[Row] = []
    path = ""
    for line in PAGE.read_text().splitlines():
        if line.startswith("## "):
            path = line.removeprefix("## ").strip("`")
        elif line.startswith("| `"):
            found.append(_row(path, line))
    return found


def _row(path: str, line: str) -> Row:
    match = _ROW.fullmatch(line)
    if match is None or match[2] not in ANSWERS:
        raise ValueError(f"not a row of fields: {line}")
    field, answer, cell, remark = match.groups()
    example, _, beside = cell.partition(" with ")
    given = {name: json.loads(value) for name, value in _MORE.findall(beside)}
    if answer != "refused":
        return Row(path, field, answer, json.loads(example.strip("`")), given, remark=remark)
    said = _MESSAGE.match(remark)
    message = said[1] if said else f"Parameter {field!r} isn't supported with this value."
    accepted = re.findall(r"`([^`]+)`", remark.partition("Accepted: ")[2])
    neutral = tuple(json.loads(value) for value in accepted)
    return Row(path, field, answer, json.loads(example.strip("`")), given, message, neutral)
