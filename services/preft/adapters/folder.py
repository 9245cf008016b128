"""Checks an adapter's folder, of whichever kind, before it is copied and after. Owns nothing but the order."""

from __future__ import annotations

from pathlib import Path

from preft.adapters.base_model import BaseModel
from preft.adapters.digest import CONFIG_FILE, LORA_FILES, REFT_FILES, WEIGHTS_FILE, adapter_files, file_size
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


def check_adapter(folder: Path, base: BaseModel, max_rank: int) -> int:
    """Reads the whole adapter, holds it against `base`, and returns its highest rank. Blocks. Raises InvalidAdapter."""
    names = adapter_files(folder)
    ranks = []
    if LORA_FILES[0] in names:
        ranks.append(check_lora(folder, base, max_rank))
    if REFT_FILES[0] in names:
        ranks.append(check_reft(folder, base, max_rank))
    return max(ranks)


def _refuse_pickles(folder: Path) -> None:
    if (folder / WEIGHTS_FILE).exists():
        return
    for name in PICKLES:
        if (folder / name).exists():
            raise InvalidAdapter(
                f"{name} in {folder} is a pickle file, which can run code when it is loaded: "
                f"save the adapter as {WEIGHTS_FILE}"
            )
