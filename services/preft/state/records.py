"""The format of workers and adapters in a store: one JSON object each, the same for every store.

A record whose fields aren't exactly this version's raises ValueError. The stores own when records are written.
"""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from typing import Any

from preft.core.cluster import BY_TIER, Adapter, AdapterLoad, Role, Tier, Worker, WorkerLoad, WorkerState


def worker_to_json(worker: Worker) -> str:
    """One line of JSON with every field."""
    return json.dumps(asdict(worker), separators=(",", ":"))


def worker_from_json(text: str) -> Worker:
    """The worker that `worker_to_json` wrote. Raises ValueError for any other text."""
    record = _record(text, Worker)
    load = record.pop("load")
    _check_fields(load, WorkerLoad)
    tiers = load.pop("tiers")
    _check_fields(tiers, AdapterLoad)
    for name in BY_TIER:
        tiers[name] = {Tier(tier): value for tier, value in tiers[name].items()}
    return Worker(
        **{
            **record,
            "role": Role(record["role"]),
            "state": WorkerState(record["state"]),
            "engine_pids": tuple(record["engine_pids"]),
            "load": WorkerLoad(**{**load, "adapters": tuple(load["adapters"]), "tiers": AdapterLoad(**tiers)}),
        }
    )


def adapter_to_json(adapter: Adapter) -> str:
    """One line of JSON with every field."""
    return json.dumps(asdict(adapter), separators=(",", ":"))


def adapter_from_json(text: str) -> Adapter:
    """The adapter that `adapter_to_json` wrote. Raises ValueError for any other text."""
    record = _record(text, Adapter)
    return Adapter(**{**record, "warnings": tuple(record["warnings"])})


def _record(text: str, cls: type[Worker | Adapter]) -> dict[str, Any]:
    record = json.loads(text)
    _check_fields(record, cls)
    return dict(record)


def _check_fields(record: Any, cls: type[Worker | Adapter | WorkerLoad | AdapterLoad]) -> None:
    names = {field.name for field in fields(cls)}
    if not isinstance(record, dict) or set(record) != names:
        raise ValueError(f"not a {cls.__name__} record of this version")
