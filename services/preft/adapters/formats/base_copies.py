"""Checks copies of the base model's embedding and output layer in an adapter's weights file.

PEFT saves these copies beside a LoRA on the output layer, and after the vocabulary was resized. PEFT also loads them
into the model. PreFT ignores a copy when it serves the adapter, so the copy must equal the base model's weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from preft.adapters.formats.adapter_tensors import DTYPES
from preft.adapters.formats.base_model import BaseModel
from preft.adapters.formats.tensor_file import TensorEntry, equal_values
from preft.core.errors import InvalidAdapter


def check_copies(
    path: Path, entries: Mapping[str, TensorEntry], copies: Mapping[str, str], base: BaseModel
) -> tuple[str, ...]:
    """Compares each copy with the base model's weight; returns warnings for the user.

    `copies` maps a tensor's name to the name of that weight. Reads all values. Raises InvalidAdapter for a difference.
    """
    size = 0
    for name, weight in copies.items():
        original = base.embeddings.get(weight)
        if original is None or original[1].dtype not in DTYPES:
            raise InvalidAdapter(
                f"{path.name}: tensor {name} can't be held against the base model, which has no {weight}"
            )
        source, entry = original
        if entries[name].shape != entry.shape:
            raise InvalidAdapter(
                f"{path.name}: tensor {name} has shape {list(entries[name].shape)}, but the base model's {weight} has "
                f"{list(entry.shape)}: adapters with a vocabulary of their own are not supported"
            )
        if not equal_values(path, entries[name], source, entry):
            raise InvalidAdapter(
                f"{path.name}: tensor {name} differs from the base model's {weight}: an adapter that changes whole "
                "weights of the base model is not supported"
            )
        size += entries[name].end - entries[name].start
    if not copies:
        return ()
    return (
        f"{path.name} holds {size} bytes of the base model's own embedding, which take room wherever the adapter is: "
        "save the adapter with save_embedding_layers=False",
    )
