"""The one rule for adapter names, on every interface, and for the names of tenants.

A name is part of URLs, command lines and log lines, so it holds no character with a special meaning there. `@`
is reserved for versions, `NAME@VERSION`, and for full names: `@TENANT/NAME` is the adapter NAME of a tenant. A shared
adapter, which belongs to no tenant, has its name alone.
"""

from __future__ import annotations

import re
import unicodedata

from preft.core.errors import InvalidAdapter

MAX_NAME = 128  # characters
TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_PUNCTUATION = frozenset("._-:/ ")


def normal_name(text: str) -> str:
    """One spelling for names that look the same: Unicode's composed form (NFC)."""
    return unicodedata.normalize("NFC", text)


def adapter_name(text: str) -> str:
    """The normal form of `text` as an adapter's name. Raises InvalidAdapter for an invalid name."""
    name = normal_name(text)
    if fault := _fault(name):
        shown = repr(name) if len(name) <= MAX_NAME else f"{name[:MAX_NAME]!r}..."
        raise InvalidAdapter(f"{shown} can't name an adapter: {fault}.", param="name")
    return name


def full_name(tenant: str, name: str) -> str:
    """The catalog's name for a tenant's adapter; `name` itself without a tenant."""
    return f"@{tenant}/{name}" if tenant else name


def split_name(full: str) -> tuple[str, str]:
    """The tenant ("" for a shared adapter) and the adapter's own name."""
    tenant, slash, name = full.removeprefix("@").partition("/")
    is_scoped = full.startswith("@") and slash and TENANT.fullmatch(tenant)
    return (tenant, name) if is_scoped else ("", full)


def catalog_name(text: str) -> str:
    """As `adapter_name`, for a full name."""
    tenant, name = split_name(text)
    return full_name(tenant, adapter_name(name))


def _fault(name: str) -> str | None:
    if not 1 <= len(name) <= MAX_NAME:
        return f"a name has 1 to {MAX_NAME} characters"
    if "@" in name:
        return "'@' separates a name from a version, as in NAME@VERSION"
    for char in name:
        if char not in _PUNCTUATION and unicodedata.category(char)[0] not in "LMN":
            return f"{char!r} is not allowed in a name. Letters, digits, '.', '_', '-', ':', '/' and spaces are"
    if name.startswith("-"):
        return "a name must not begin with '-', which a command line takes for an option"
    for part in name.split("/"):
        if part in ("", ".", ".."):
            return f"{part!r} must not be a part of a name, as URLs with such parts are rewritten on their way"
        if part != part.strip() or "  " in part:
            return "a name must not begin or end with a space, nor hold two in a row"
    return None
