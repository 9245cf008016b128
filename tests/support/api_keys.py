"""Files of API keys, and the keys themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from preft.gateway.access.access import Access
from preft.gateway.access.keys import Keys, checked_entry, hash_of
from support.fakes import FakeCatalog


def secret_of(name: str) -> str:
    """The text of the key `name`."""
    return f"preft-secret-of-{name}"


def bearer(name: str) -> dict[str, str]:
    """The headers, or the metadata's one pair, of a request with the key `name`."""
    return {"authorization": f"Bearer {secret_of(name)}"}


def entries(keys: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {name: {"sha256": hash_of(secret_of(name)), **fields} for name, fields in keys.items()}


def write_keys(path: Path, **keys: dict[str, Any]) -> Path:
    """Writes a file with these keys, by name, in one step."""
    new = path.with_name(f"{path.name}.new")
    new.write_text(yaml.safe_dump(entries(keys)))
    new.rename(path)
    return path


def keys_of(**keys: dict[str, Any]) -> Keys:
    return Keys(checked_entry(Path("keys.yaml"), name, entry) for name, entry in entries(keys).items())


def access_of(catalog: FakeCatalog, **keys: dict[str, Any]) -> Access:
    """The access of a gateway with these keys."""
    own = keys_of(**keys)
    return Access(lambda: own, catalog)
