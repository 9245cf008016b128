"""API keys: how one is made, and the file that knows them by their hashes.

A key holds 256 random bits, so its plain SHA-256 tells nothing about it and can't be guessed: no slow hash is needed.
"""

from __future__ import annotations

import fnmatch
import hashlib
import hmac
import re
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from preft.core.errors import ConfigError
from preft.core.limits import KeyLimits
from preft.core.names import TENANT, normal_name
from preft.core.settings import Bytes

PREFIX = "preft-"
NAME = TENANT  # names of keys stand in logs, labels and keys of Redis, as those of tenants do
COUNT = Annotated[int, Field(ge=1, le=10**12)]


class KeyEntry(BaseModel):
    """One key in the file, under its name."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    tenant: Annotated[str, Field(pattern=rf"^({TENANT.pattern})?$")] = ""
    adapters: tuple[Annotated[str, Field(min_length=1, max_length=256)], ...] = ("*",)
    admin: bool = False
    requests_per_minute: COUNT | None = None
    tokens_per_minute: COUNT | None = None
    concurrent_requests: COUNT | None = None
    adapter_bytes: Bytes | None = None


@dataclass(frozen=True, slots=True)
class ApiKey:
    """One key. `tenant` "" is no tenant. `adapters` matches the names of the adapters that the key may use."""

    name: str
    sha256: str
    tenant: str
    adapters: re.Pattern[str]
    admin: bool
    limits: KeyLimits
    adapter_bytes: int | None

    @property
    def is_operator(self) -> bool:
        """Whether the key belongs to no tenant and may administer: it sees tenants' adapters by their full names."""
        return self.admin and not self.tenant

    def may_use(self, name: str) -> bool:
        """Whether the key may use adapters of this name: the full name for an operator, else without the tenant."""
        return self.adapters.match(name) is not None


class Keys:
    """All keys of a file."""

    def __init__(self, keys: Iterable[ApiKey] = ()) -> None:
        self._by_hash = {key.sha256: key for key in keys}

    def __len__(self) -> int:
        return len(self._by_hash)

    def find(self, secret: str) -> ApiKey | None:
        """The key whose text is `secret`.

        The time of the look-up depends on a hash of the presented text's hash alone, and the comparison takes constant
        time: both tell nothing about a key.
        """
        shown = hash_of(secret)
        key = self._by_hash.get(shown)
        return key if key is not None and hmac.compare_digest(key.sha256, shown) else None


def new_secret() -> str:
    """A new key's text."""
    return PREFIX + secrets.token_urlsafe(32)


def hash_of(secret: str) -> str:
    """The form in which the file knows a key."""
    return hashlib.sha256(secret.encode(errors="surrogatepass")).hexdigest()


def read_keys(path: Path) -> Keys:
    """The keys of the file. Raises ConfigError, whose message shows no hash."""
    from preft.core.yaml_text import read_mapping

    return Keys(checked_entry(path, name, given) for name, given in _distinct(path, read_mapping(path)).items())


def checked_entry(path: Path, name: object, given: object) -> ApiKey:
    """Raises ConfigError."""
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ConfigError(f"api_keys: {path}: {name!r} can't name a key: use 1 to 64 letters, digits, '.', '_' and '-'")
    try:
        entry = KeyEntry.model_validate(given)
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        place = ".".join(map(str, (name, *first["loc"])))
        problem = _PROBLEMS.get(str(first["loc"][-1]) if first["loc"] else "", first["msg"])
        raise ConfigError(f"api_keys: {path}: {place}: {problem}") from None
    limits = KeyLimits(entry.requests_per_minute, entry.tokens_per_minute, entry.concurrent_requests)
    patterns = re.compile("|".join(fnmatch.translate(normal_name(pattern)) for pattern in entry.adapters) or r"(?!)")
    return ApiKey(name, entry.sha256, entry.tenant, patterns, entry.admin, limits, entry.adapter_bytes)


def _distinct(path: Path, entries: Mapping[str, Any]) -> Mapping[str, Any]:
    """`entries`. Raises ConfigError if two have one hash: nobody could tell which one a caller means."""
    names: dict[str, str] = {}
    for name, given in entries.items():
        shown = given.get("sha256") if isinstance(given, dict) else None
        if isinstance(shown, str) and names.setdefault(shown, name) != name:
            raise ConfigError(f"api_keys: {path}: {names[shown]} and {name} have the same sha256")
    return entries


_PROBLEMS = {
    "sha256": "give the 64 hexadecimal digits, in quotes, that `preft key` printed",
    "tenant": "a tenant's name has 1 to 64 letters, digits, '.', '_' and '-'",
}
