"""Checks an adapter's folder, of whichever kind, against the base model. Owns nothing but the order."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from preft.adapters.base_model import BaseModel
from preft.adapters.digest import CONFIG_FILE, PREFILL_ONLY, REFT_CONFIG_FILE, adapter_files, file_size
from preft.adapters.peft_format import check_lora
from preft.adapters.reft_format import check_reft


@dataclass(frozen=True, slots=True)
class AdapterSummary:
    """What the catalog remembers of a folder that passed: "lora", "reft" or "lora+reft", and its highest rank.

    `prefill_only` is whether its configuration says that it was trained for the prompt pass alone; `size` its files'
    bytes.
    """

    kind: str
    rank: int
    prefill_only: bool
    size: int


def check_adapter(folder: Path, base: BaseModel, max_rank: int) -> AdapterSummary:
    """Reads the whole adapter and holds it against `base`. Blocks while it reads. Raises InvalidAdapter."""
    names = adapter_files(folder)
    ranks = {
        kind: check(folder, base, max_rank)
        for kind, file, check in (("lora", CONFIG_FILE, check_lora), ("reft", REFT_CONFIG_FILE, check_reft))
        if file in names
    }
    configs = [json.loads((folder / file).read_bytes()) for file in (CONFIG_FILE, REFT_CONFIG_FILE) if file in names]
    prefill_only = all(config.get(PREFILL_ONLY) is True for config in configs)
    size = sum(file_size(folder, name) for name in names)
    return AdapterSummary("+".join(ranks), max(ranks.values()), prefill_only, size)
