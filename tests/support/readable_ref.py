"""Adapters whose digests are words, for tests of code that only compares digests."""

from __future__ import annotations

from dataclasses import dataclass

from preft.core.request import AdapterRef


@dataclass(frozen=True, slots=True)
class ReadableRef(AdapterRef):
    """An AdapterRef without the rule that a digest is 64 hexadecimal digits."""

    def __post_init__(self) -> None:
        pass
