"""Reads `reft_config.json`: method, layers, rank and positions. docs/adapters.md documents the format.

`reft_format` checks the tensors.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preft.adapters.formats.digest import PREFILL_ONLY, REFT_CONFIG_FILE
from preft.core.errors import InvalidAdapter

METHODS = ("loreft", "direft")
FIELDS = ("peft_type", "method", "r", "layers", "positions", PREFILL_ONLY, "base_model_name_or_path")
POSITIONS = re.compile(r"(?:f(?P<first>[1-9]\d{0,8}))?\+?(?:l(?P<last>[1-9]\d{0,8}))?")
EVERY = 1 << 31  # more positions than any prompt has


@dataclass(frozen=True, slots=True)
class ReftConfig:
    """The adapter's computation. The adapter changes the prompt's `first` first and `last` last positions."""

    method: str
    rank: int
    layers: tuple[int, ...]
    first: int
    last: int


def read_reft_config(folder: Path) -> ReftConfig:
    """The config in `folder`. Raises InvalidAdapter, naming the field, for a broken or unsupported config."""
    try:
        return parse_reft_config((folder / REFT_CONFIG_FILE).read_bytes())
    except OSError as error:
        raise InvalidAdapter(f"{REFT_CONFIG_FILE} can't be read: {error.strerror}") from error


def parse_reft_config(content: bytes) -> ReftConfig:
    """The config in a file's `content`. Raises InvalidAdapter, naming the field."""
    try:
        config = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InvalidAdapter(f"{REFT_CONFIG_FILE} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise InvalidAdapter(f"{REFT_CONFIG_FILE} is not a JSON object")
    if unknown := sorted(config.keys() - set(FIELDS)):
        raise _wrong(f"{unknown[0]} is unknown, there are {', '.join(FIELDS)}")
    if config.get("peft_type") != "REFT":
        raise _wrong(f"peft_type is {config.get('peft_type')!r}, not 'REFT'")
    if config.get("method") not in METHODS:
        raise _wrong(f"method is {config.get('method')!r}, served are {' and '.join(METHODS)}")
    rank, layers = config.get("r"), config.get("layers")
    if type(rank) is not int or rank < 1:
        raise _wrong(f"r is {rank!r}, a rank is a whole number from 1 on")
    if not isinstance(layers, list) or not layers or not all(type(layer) is int and layer >= 0 for layer in layers):
        raise _wrong(f"layers is {layers!r}, not a list of layer numbers from 0 on")
    if len(set(layers)) < len(layers):
        raise _wrong("layers names one twice")
    return ReftConfig(config["method"], rank, tuple(layers), *read_positions(config.get("positions")))


def read_positions(value: Any) -> tuple[int, int]:
    """The number of first and of last positions that `value` selects. Raises InvalidAdapter."""
    if value == "all":
        return EVERY, 0
    match = POSITIONS.fullmatch(value) if isinstance(value, str) else None
    both = match is not None and match["first"] is not None and match["last"] is not None
    if match is None or not (match["first"] or match["last"]) or ("+" in value) != both:
        raise _wrong(f"positions is {value!r}: write 'all', or for example 'f2', 'l3' or 'f2+l3'")
    return int(match["first"] or 0), int(match["last"] or 0)


def _wrong(problem: str) -> InvalidAdapter:
    return InvalidAdapter(f"{REFT_CONFIG_FILE}: {problem}")
