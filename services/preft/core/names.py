"""The one rule for adapter names, on every interface.

A name is part of URLs, command lines and log lines, so it holds no character with a special meaning there. `@`
is reserved for versions: `NAME@VERSION`.
"""

from __future__ import annotations

import unicodedata

from preft.core.errors import InvalidAdapter

MAX_NAME = 128  # characters
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
