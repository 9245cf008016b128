"""The adapter catalog as clients see it: single entries, and pages of matching entries.

Knows no transport: HTTP and gRPC both list through `page`.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter

from preft.core.cluster import Adapter
from preft.core.errors import ModelNotFound
from preft.core.ports import AdapterCatalog
from preft.gateway.bodies.adapter_schemas import ListQuery

_DIGEST = re.compile(r"[0-9a-f]{12,64}")  # the whole digest or its beginning; tables show 12 digits


@dataclass(frozen=True, slots=True)
class Page:
    """`entries` in name order, out of `total` matches; `has_more` says whether more entries follow."""

    entries: Sequence[Adapter]
    total: int
    has_more: bool


def entry(catalog: AdapterCatalog, name: str) -> Adapter:
    """Raises ModelNotFound if no entry has that name."""
    adapter = catalog.get(name)
    if adapter is None:
        raise ModelNotFound(f"no adapter is named {name!r}")
    return adapter


def served_version(catalog: AdapterCatalog, model: str) -> Adapter:
    """The version that NAME, NAME@VERSION or NAME@DIGEST means. Only the current version of a name is served.

    Raises ModelNotFound, also for any version but the current one.
    """
    name, at, version = model.rpartition("@")
    if not name:  # a full name, @TENANT/NAME
        name, at, version = model, "", ""
    adapter = catalog.get(name)
    if adapter is None:
        raise ModelNotFound(f"The model {model!r} does not exist.")
    is_digest = _DIGEST.fullmatch(version) and adapter.digest.startswith(version)
    if at and version != str(adapter.version) and not is_digest:
        raise ModelNotFound(f"The model {model!r} does not exist: version {adapter.version} of {name!r} is served now.")
    return adapter


def page(entries: Sequence[Adapter], query: ListQuery) -> Page:
    """The page of `entries` (sorted by name) that matches `query`. Without filters, only this page costs time."""
    if query.filters:
        search = query.search.casefold()
        entries = [
            adapter
            for adapter in entries
            if (query.kind is None or adapter.kind == query.kind)
            and (query.pinned is None or adapter.pinned == query.pinned)
            and (not search or search in adapter.name.casefold())
        ]
    start = bisect_right(entries, query.after, key=attrgetter("name")) if query.after else 0
    shown = entries[start : start + query.limit]
    return Page(shown, len(entries), start + len(shown) < len(entries))
