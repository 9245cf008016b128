"""Checks an adapter's folder of either kind against the base model. `peft_format` and `reft_format` own the checks."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from preft.adapters.formats.base_model import BaseModel
from preft.adapters.formats.digest import CONFIG_FILE, PREFILL_ONLY, REFT_CONFIG_FILE, adapter_files, file_size
from preft.adapters.formats.peft_format import check_lora
from preft.adapters.formats.reft_format import check_reft

NOT_PREFILL_ONLY = (
    'its configuration doesn\'t say "prefill_only": true. Here an adapter acts on the prompt alone; '
    "one that was trained to act on the output too answers worse, up to not at all"
)


@dataclass(frozen=True, slots=True)
class AdapterSummary:
    """The facts about a valid folder that the catalog stores. `kind` is "lora", "reft" or "lora+reft".

    `rank` is the highest rank, `size` the bytes of the adapter's files. `prefill_only` is whether each configuration
    says that the adapter was trained for the prompt alone. `warnings` are sentences for the user: the adapter is
    served, but perhaps not as the user expects.
    """

    kind: str
    rank: int
    prefill_only: bool
    size: int
    warnings: tuple[str, ...] = ()


def check_adapter(folder: Path, base: BaseModel, max_rank: int) -> AdapterSummary:
    """Reads the whole adapter and checks it against `base`. Blocks. Raises InvalidAdapter."""
    names = adapter_files(folder)
    ranks, warnings = {}, []
    if CONFIG_FILE in names:
        lora = check_lora(folder, base, max_rank)
        ranks["lora"], warnings = lora.rank, [*lora.warnings]
    if REFT_CONFIG_FILE in names:
        ranks["reft"] = check_reft(folder, base, max_rank)
    configs = [json.loads((folder / file).read_bytes()) for file in (CONFIG_FILE, REFT_CONFIG_FILE) if file in names]
    prefill_only = all(config.get(PREFILL_ONLY) is True for config in configs)
    size = sum(file_size(folder, name) for name in names)
    if not prefill_only:
        warnings.append(NOT_PREFILL_ONLY)
    return AdapterSummary("+".join(ranks), max(ranks.values()), prefill_only, size, tuple(warnings))
