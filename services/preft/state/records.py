"""The format of workers and adapters in a store: one JSON object each, the same for every store.

Processes of two versions share a store during an upgrade. So a reader ignores fields that it doesn't know, and fills in
missing fields that have a default. The stores own when records are written.
"""

from __future__ import annotations

import logging
from typing import Generic, TypeVar

from pydantic import TypeAdapter, ValidationError

from preft.core.cluster import Adapter, Worker

T = TypeVar("T", Worker, Adapter)

logger = logging.getLogger(__name__)


class Records(Generic[T]):
    """Writes and reads the records of one kind. Warns once about each record that it can't read."""

    def __init__(self, kind: type[T]) -> None:
        self._kind = kind
        self._format: TypeAdapter[T] = TypeAdapter(kind)
        self._warned: set[str] = set()  # keys

    def write(self, value: T) -> str:
        """One line of JSON with every field. Raises ValueError for text that isn't Unicode."""
        return self._format.dump_json(value).decode()

    def parse(self, text: str | bytes) -> T:
        """The value that `write` wrote, in this version or another. Raises ValueError, with one sentence."""
        try:
            return self._format.validate_json(text, strict=True)
        except ValidationError as error:
            first = error.errors(include_input=False, include_url=False, include_context=False)[0]
            place = "".join(f"{part}: " for part in first["loc"])
            raise ValueError(f"not a record of this version's {self._kind.__name__}: {place}{first['msg']}") from None

    def read(self, key: str, text: str | bytes) -> T | None:
        """The value of the record under `key`. None for a record that this version can't read, with a warning."""
        try:
            return self.parse(text)
        except ValueError as error:
            if key not in self._warned:
                self._warned.add(key)
                logger.warning("the state store's record of %s %r is skipped: %s", self._kind.__name__, key, error)
            return None
