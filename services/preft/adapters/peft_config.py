"""Reads `adapter_config.json` of a PEFT LoRA folder and refuses what can't be served exactly.

Everything that changes what the adapter computes is either understood here or an error; PEFT's training settings are
none of our business.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preft.adapters.digest import CONFIG_FILE
from preft.core.errors import InvalidAdapter

# Field -> what it stands for. PEFT writes them all; only a true or non-empty value counts.
UNSUPPORTED = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal LoRA",
    "lora_bias": "a bias in the LoRA layers",
    "modules_to_save": "fully trained modules beside the LoRA",
    "layer_replication": "replicated layers",
    "alora_invocation_tokens": "activated LoRA (aLoRA)",
    "fan_in_fan_out": "transposed weights",
    "target_parameters": "LoRA on bare parameters",
    "trainable_token_indices": "trained token embeddings",
    "arrow_config": "Arrow routing",
}
# These say how training began; the others (PiSSA, OLoRA, CorDA, LoftQ) change the base model's weights too.
PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")

PLAIN_PATTERN = re.compile(r"[\w.-]+")
MATCH_SECONDS = 1  # of processor time, for all patterns and modules
MATCHER = r"""
import json, re, resource, sys
resource.setrlimit(resource.RLIMIT_CPU, (int(sys.argv[1]), int(sys.argv[1])))
patterns, modules = json.load(sys.stdin)
for pattern in patterns:
    for module in modules:
        re.fullmatch(rf"(.*\.)?({pattern})", module)
"""


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """The part of the config that says what the adapter computes: the rank of every module it adapts."""

    rank: int
    rank_pattern: Mapping[str, int]
    patterns: Sequence[str] = ()
    """All that aren't just names, of ranks and of alphas."""

    @property
    def largest_rank(self) -> int:
        """The highest rank any module may have."""
        return max(self.rank, *self.rank_pattern.values(), 0)

    def rank_of(self, module: str) -> int:
        """The rank of `module`, a full name. As in PEFT a pattern matches from a dot to the end; the first one wins."""
        for pattern, rank in self.rank_pattern.items():
            if re.fullmatch(rf"(.*\.)?({pattern})", module):
                return rank
        return self.rank


def check_patterns(config: LoraConfig, modules: Collection[str]) -> None:
    """Raises InvalidAdapter if holding the config's patterns against these names takes long.

    Some patterns take for ever, and nothing can stop Python while it matches: so another process tries.
    """
    if not config.patterns:
        return
    tried = subprocess.run(
        [sys.executable, "-I", "-c", MATCHER, str(MATCH_SECONDS)],
        input=json.dumps([config.patterns, list(modules)]).encode(),
        stderr=subprocess.DEVNULL,
        check=False,
    )
    if tried.returncode:
        raise InvalidAdapter(
            f"{CONFIG_FILE}: the patterns of rank_pattern and alpha_pattern take more than {MATCH_SECONDS} s to match"
        )


def read_config(folder: Path, max_rank: int) -> LoraConfig:
    """The config in `folder`. Raises InvalidAdapter, naming the field, if it's broken or not supported."""
    config = _load(folder)
    _check_kind(config)
    for field, meaning in UNSUPPORTED.items():
        if config.get(field):
            raise InvalidAdapter(f"{CONFIG_FILE}: {field} is set, and {meaning} is not supported")
    for field, value in config.items():
        if field.startswith("use_") and field != "use_rslora" and value:
            raise InvalidAdapter(f"{CONFIG_FILE}: {field} is set, which is not supported")
    if config.get("bias", "none") != "none":
        raise InvalidAdapter(f"{CONFIG_FILE}: bias is {config['bias']!r}, only 'none' is supported")
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower() not in PLAIN_INITS:
        raise InvalidAdapter(
            f"{CONFIG_FILE}: init_lora_weights is {init!r}, which changes the base model's weights: "
            "convert the adapter to a plain LoRA with PEFT's path_initial_model_for_weight_conversion"
        )
    if not (config.get("target_modules") and isinstance(config["target_modules"], str | list)):
        raise InvalidAdapter(f"{CONFIG_FILE}: target_modules is missing or empty")
    _check_number("lora_alpha", config.get("lora_alpha"))
    alphas = _pattern(config, "alpha_pattern")
    for pattern, alpha in alphas.items():
        _check_number(f"alpha_pattern[{pattern!r}]", alpha)
    _check_rank("r", config.get("r"), max_rank)
    ranks = _pattern(config, "rank_pattern")
    for pattern, rank in ranks.items():
        _check_rank(f"rank_pattern[{pattern!r}]", rank, max_rank)
    intricate = [pattern for pattern in (*ranks, *alphas) if not PLAIN_PATTERN.fullmatch(pattern)]
    return LoraConfig(config["r"], ranks, intricate)


def _load(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / CONFIG_FILE).read_bytes())
    except OSError as error:
        raise InvalidAdapter(f"{CONFIG_FILE} can't be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InvalidAdapter(f"{CONFIG_FILE} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise InvalidAdapter(f"{CONFIG_FILE} is not a JSON object")
    return config


def _check_kind(config: dict[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise InvalidAdapter(f"{CONFIG_FILE}: peft_type is {kind!r}, only 'LORA' is supported")


def _pattern(config: dict[str, Any], field: str) -> dict[str, Any]:
    patterns = config.get(field) or {}
    if not isinstance(patterns, dict):
        raise InvalidAdapter(f"{CONFIG_FILE}: {field} is not an object")
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise InvalidAdapter(f"{CONFIG_FILE}: {field} has {pattern!r}, which is not a valid pattern") from error
    return patterns


def _check_rank(field: str, rank: object, max_rank: int) -> None:
    if type(rank) is not int or rank < 1:
        raise InvalidAdapter(f"{CONFIG_FILE}: {field} is {rank!r}, a rank is a whole number from 1 on")
    if rank > max_rank:
        raise InvalidAdapter(f"{CONFIG_FILE}: {field} is {rank}, more than the largest served rank {max_rank}")


def _check_number(field: str, value: object) -> None:
    try:
        finite = type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]
    except OverflowError:  # JSON allows whole numbers beyond any float
        finite = False
    if not finite:
        raise InvalidAdapter(f"{CONFIG_FILE}: {field} is {value!r}, not a finite number")
