"""Explains what a folder without an adapter holds, and what the user should give. Only file names count."""

from __future__ import annotations

import re
from collections.abc import Iterable

from preft.adapters.formats.digest import CONFIG_FILE, REFT_CONFIG_FILE, WEIGHTS_FILE

PICKLES = ("adapter_model.bin", "adapter_model.pt")
INDEX = f"{WEIGHTS_FILE}.index.json"
MODEL = "model.safetensors"
TELLTALES = (*PICKLES, INDEX, MODEL, f"{MODEL}.index.json", "pytorch_model.bin", "adapters.safetensors")
"""Names to test for where a folder can't be listed."""

CHECKPOINT = r"checkpoint-\d+/"  # of Hugging Face's trainer
KINDS = (  # pattern of a file name, explanation; the first match counts
    (
        r"adapter_model-\d+-of-\d+\.(safetensors|bin)|adapter_model\.(safetensors|bin)\.index\.json",
        f"is one of several files with the weights: save them as one file, {WEIGHTS_FILE}",
    ),
    (
        r"adapter_model\.(bin|pt)|adapter.*\.(bin|pt|pth|ckpt|pkl)",
        f"is a pickle file, which can run code when it is loaded: save the adapter as {WEIGHTS_FILE}",
    ),
    (r"intkey_.*\.bin", "is of an adapter that pyreft saved: convert it with `preft adapter convert`"),
    (r"adapters\.(safetensors|npz)", "is of an adapter that MLX saved: convert it to PEFT's format"),
    (r".*\.gguf", "is a GGUF file: give the adapter in PEFT's format"),
    (
        r"(model|pytorch_model|consolidated)[-.].*",
        "belongs to a whole model, perhaps with an adapter merged into it: give the adapter as it was before, or serve "
        "the model itself with `preft serve --model`",
    ),
)


def explain(names: Iterable[str], place: str) -> str | None:
    """One sentence about a known one of the `names` in `place`, or None.

    The name of a subfolder ends in a slash. The name of a file in a subfolder includes the subfolder.
    """
    names = sorted(names)
    inside = {name.partition("/")[0] for name in names if name.endswith((f"/{CONFIG_FILE}", f"/{REFT_CONFIG_FILE}"))}
    nested = sorted(inside | {name[:-1] for name in names if re.fullmatch(CHECKPOINT, name)}, key=_in_order)
    if nested:
        return (
            f"the adapter files are not in {place} but in its subfolders ({', '.join(nested[:3])}): give one of these"
        )
    for pattern, says in KINDS:
        for name in names:
            if re.fullmatch(pattern, name):
                return f"{name} in {place} {says}"
    return None


def _in_order(name: str) -> tuple[str, int]:
    text, _, number = name.rpartition("-")
    return (text, int(number)) if number.isdecimal() else (name, 0)
