"""The cluster's memory behind one interface: which workers exist and which adapters the catalog names."""

from __future__ import annotations

from pathlib import Path

from preft.core.errors import ConfigError
from preft.core.ports import StateStore
from preft.state.sqlite import SqliteStore

__all__ = ["open_store"]


def open_store(url: str | Path) -> StateStore:
    """The store at `url`: a file path, or `sqlite:///absolute/path`. Creates the file if there is none.

    Raises ConfigError if the scheme is unknown or the file can't be used. Blocks for some milliseconds.
    """
    text = str(url)
    scheme, separator, rest = text.partition("://")
    if not separator:
        return SqliteStore(Path(text))
    if scheme == "sqlite" and rest.startswith("/"):
        return SqliteStore(Path(rest))
    raise ConfigError(f"state store {text!r}: give a file path or sqlite:///absolute/path")
