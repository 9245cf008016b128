"""The adapter catalog in JSON: one entry, one page of entries, and one worker's copy of an adapter."""

from __future__ import annotations

from typing import Any

from preft.core.cluster import Adapter, AdapterPlace
from preft.gateway.http.reply_types import AdapterReply, PlaceReply
from preft.gateway.listing import Page


def page_json(found: Page) -> dict[str, Any]:
    """An AdapterList: a page in the form of OpenAI's lists; an entry's id is its name."""
    names = [adapter.name for adapter in found.entries]
    return {
        "object": "list",
        "data": [adapter_json(adapter) for adapter in found.entries],
        "first_id": names[0] if names else None,
        "last_id": names[-1] if names else None,
        "has_more": found.has_more,
        "total": found.total,
    }


def adapter_json(adapter: Adapter) -> dict[str, Any]:
    """One entry, as AdapterReply describes it."""
    own = {name: getattr(adapter, name) for name in AdapterReply.__annotations__ if name != "object"}
    return {"object": "adapter", **own, "created": int(adapter.created), "warnings": list(adapter.warnings)}


def place_json(place: AdapterPlace) -> PlaceReply:
    """One worker's copy of the adapter."""
    return {"worker": place.worker_id, "state": place.state.value, "prompts": place.prompts}
