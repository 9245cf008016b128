"""Reads `adapter_config.json` of a PEFT LoRA folder, and refuses fields that can't be served exactly.

This module either uses or refuses each field that changes the computation. `peft_fields` lists the fields of both
kinds. `peft_targets` finds the modules that the adapter changes.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preft.adapters.formats.digest import CONFIG_FILE
from preft.adapters.formats.patterns import Match, ending
from preft.adapters.formats.peft_fields import HARMLESS, READ, REFUSED, is_set
from preft.adapters.formats.peft_targets import Targets, read_targets
from preft.core.errors import InvalidAdapter

PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica")  # set the adapter's first weights and change no other weight
BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq")  # PEFT changes the base model when it loads these
LORA_GA = "lora_ga"
LORA_GA_WARNING = (
    f"init_lora_weights in {CONFIG_FILE} is {LORA_GA}, which changes the base model's weights for the training. The "
    "adapter is served on the unchanged base model, as PEFT loads it: save it with PEFT's "
    "path_initial_model_for_weight_conversion"
)


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """The fields that define the adapter's computation, and warnings for the user."""

    rank: int
    alpha: float
    use_rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    targets: Targets
    warnings: tuple[str, ...]

    def ranks(self, spellings: Mapping[str, Collection[str]], match: Match) -> dict[str, int]:
        """The rank of each module. `spellings` has all names of each module. As in PEFT, the first pattern wins."""
        return _by_pattern(self.rank_pattern, self.rank, spellings, match)

    def scalings(
        self, ranks: Mapping[str, int], spellings: Mapping[str, Collection[str]], match: Match
    ) -> dict[str, float]:
        """The factor of each module's B A x: alpha / rank, or alpha / sqrt(rank) for rsLoRA."""
        alphas = _by_pattern(self.alpha_pattern, self.alpha, spellings, match)
        return {
            module: alphas[module] / (math.sqrt(rank) if self.use_rslora else rank) for module, rank in ranks.items()
        }


def _by_pattern(
    values: Mapping[str, Any], default: Any, spellings: Mapping[str, Collection[str]], match: Match
) -> dict[str, Any]:
    if not values:
        return dict.fromkeys(spellings, default)
    names = sorted({name for spelled in spellings.values() for name in spelled})
    found = match([ending(pattern) for pattern in values], names)
    by_name: dict[str, Any] = {}
    for pattern in reversed([*values]):  # the first pattern is written last, and so wins
        by_name.update(dict.fromkeys(found[ending(pattern)], values[pattern]))
    return {
        module: next((by_name[name] for name in spelled if name in by_name), default)
        for module, spelled in spellings.items()
    }


def read_lora_config(folder: Path, max_rank: int) -> LoraConfig:
    """The config in `folder`. Raises InvalidAdapter, naming the field, for a broken or unsupported config."""
    try:
        content = (folder / CONFIG_FILE).read_bytes()
    except OSError as error:
        raise InvalidAdapter(f"{CONFIG_FILE} can't be read: {error.strerror}") from error
    return parse_lora_config(content, max_rank)


def parse_lora_config(content: bytes, max_rank: int) -> LoraConfig:
    """The config in a file's `content`. Raises InvalidAdapter, naming the field."""
    config = _object(content)
    if config.get("peft_type") != "LORA":
        raise _wrong(f"peft_type is {config.get('peft_type')!r}, only 'LORA' is supported")
    _refuse_unsupported(config)
    warnings = _check_init(config.get("init_lora_weights", True))
    rslora = config.get("use_rslora") or False
    if type(rslora) is not bool:
        raise _wrong(f"use_rslora is {rslora!r}, not true or false")
    _check_number("lora_alpha", config.get("lora_alpha"))
    alphas = _pattern(config, "alpha_pattern")
    for pattern, alpha in alphas.items():
        _check_number(f"alpha_pattern[{pattern!r}]", alpha)
    _check_rank("r", config.get("r"), max_rank)
    ranks = _pattern(config, "rank_pattern")
    for pattern, rank in ranks.items():
        _check_rank(f"rank_pattern[{pattern!r}]", rank, max_rank)
    targets = read_targets(config)
    return LoraConfig(config["r"], config["lora_alpha"], rslora, ranks, alphas, targets, warnings)


def _object(content: bytes) -> dict[str, Any]:
    try:
        config = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InvalidAdapter(f"{CONFIG_FILE} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise InvalidAdapter(f"{CONFIG_FILE} is not a JSON object")
    return config


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    for field, value in config.items():
        if field in READ or field in HARMLESS or not is_set(value):
            continue
        if field in REFUSED:
            raise _wrong(f"{field} is set, and {REFUSED[field]} is not supported")
        raise _wrong(f"{field} is set, which is unknown here and may change what the adapter computes")
    if (config.get("bias") or "none") != "none":
        raise _wrong(f"bias is {config['bias']!r}, only 'none' is supported")


def _check_init(init: Any) -> tuple[str, ...]:
    """Warnings for the user. Raises InvalidAdapter if PEFT would change the base model."""
    if init is None or isinstance(init, bool):
        return ()
    name = init.lower() if isinstance(init, str) else ""
    if name.startswith(BASE_CHANGING_INITS):
        raise _wrong(
            f"init_lora_weights is {init!r}, which changes the base model's weights: "
            "convert the adapter to a plain LoRA with PEFT's path_initial_model_for_weight_conversion"
        )
    if name != LORA_GA and name not in PLAIN_INITS:
        raise _wrong(f"init_lora_weights is {init!r}, which is unknown here and may change the base model's weights")
    return (LORA_GA_WARNING,) if name == LORA_GA else ()


def _pattern(config: Mapping[str, Any], field: str) -> dict[str, Any]:
    patterns = config.get(field) or {}
    if not isinstance(patterns, dict):
        raise _wrong(f"{field} is not an object")
    for pattern in patterns:
        try:
            re.compile(ending(pattern))
        except re.error as error:
            raise _wrong(f"{field} has {pattern!r}, which is not a valid pattern") from error
    return patterns


def _check_rank(field: str, rank: object, max_rank: int) -> None:
    if type(rank) is not int or rank < 1:
        raise _wrong(f"{field} is {rank!r}, a rank is a whole number from 1 on")
    if rank > max_rank:
        raise _wrong(f"{field} is {rank}, more than the largest served rank {max_rank}: raise prefill.max_lora_rank")


def _check_number(field: str, value: object) -> None:
    try:
        finite = type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]
    except OverflowError:  # JSON allows whole numbers beyond any float
        finite = False
    if not finite:
        raise _wrong(f"{field} is {value!r}, not a finite number")


def _wrong(problem: str) -> InvalidAdapter:
    return InvalidAdapter(f"{CONFIG_FILE}: {problem}")
