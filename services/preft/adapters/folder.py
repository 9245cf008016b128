"""Checks an adapter's folder, of whichever kind, before it is copied and after. Owns nothing but the order."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from preft.adapters.base_model import BaseModel
from preft.adapters.digest import CONFIG_FILE, PREFILL_ONLY, REFT_CONFIG_FILE, WEIGHTS_FILE, adapter_files, file_size
from preft.adapters.peft_format import check_lora
from preft.adapters.reft_format import check_reft
from preft.core.errors import InvalidAdapter

PICKLES = ("adapter_model.bin", "adapter_model.pt")


def check_files(folder: Path, max_bytes: int | None = None) -> None:
    """Cheap checks on the folder itself, before anything is copied. Raises InvalidAdapter."""
    if not folder.is_dir():
        raise InvalidAdapter(f"{folder} is not a folder")
    names = adapter_files(folder)
    if CONFIG_FILE in names:
        file_size(folder, CONFIG_FILE)
        _refuse_pickles(folder)
    size = sum(file_size(folder, name) for name in names)
    if max_bytes is not None and size > max_bytes:
        raise InvalidAdapter(f"{folder} holds an adapter of {size} bytes, more than the limit of {max_bytes}")


@dataclass(frozen=True, slots=True)
class AdapterSummary:
    """What the catalog remembers of a folder that passed: "lora", "reft" or "lora+reft", and its highest rank.

    `prefill_only` is whether its configuration says that it was trained for the prompt pass alone.
    """

    kind: str
    rank: int
    prefill_only: bool


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
    return AdapterSummary("+".join(ranks), max(ranks.values()), prefill_only)


def _refuse_pickles(folder: Path) -> None:
    if (folder / WEIGHTS_FILE).exists():
        return
    for name in PICKLES:
        if (folder / name).exists():
            raise InvalidAdapter(
                f"{name} in {folder} is a pickle file, which can run code when it is loaded: "
                f"save the adapter as {WEIGHTS_FILE}"
            )
