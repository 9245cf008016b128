"""Copies of the base model's embedding and output layer in an adapter's weights file.

PEFT saves them beside a LoRA on the output layer, and when the vocabulary was resized; and puts them into the model
when it loads the adapter. A copy is left out when served, so it must equal the base model's weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from preft.adapters.adapter_tensors import DTYPES
from preft.adapters.base_model import BaseModel
from preft.adapters.tensor_file import TensorEntry, equal_values
from preft.core.errors import InvalidAdapter


def check_copies(
    path: Path, entries: Mapping[str, TensorEntry], copies: Mapping[str, str], base: BaseModel
) -> tuple[str, ...]:
    """What the user should be told of `copies`: which weight of the base model each of these tensors is.

    Reads them all. Raises InvalidAdapter for one that differs from the base model's weight.
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
