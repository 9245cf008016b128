"""Dataclasses for objects that are made once per token.

A frozen dataclass sets each field through `object.__setattr__`, and takes five times as long to make as one that isn't
frozen. Here type checkers alone see that the fields are frozen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar, dataclass_transform

Kind = TypeVar("Kind")


@dataclass_transform(frozen_default=True)
def light_dataclass(kind: type[Kind]) -> type[Kind]:
    """As `dataclass(frozen=True, slots=True)`. Assigning a field raises nothing at run time."""
    return dataclass(slots=True, unsafe_hash=True)(kind)
