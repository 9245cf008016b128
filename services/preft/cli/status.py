"""`preft status`: the workers of a cluster on this machine, as its state store remembers them."""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from preft.cli.table import table
from preft.core.cluster import Worker, WorkerState
from preft.core.errors import Unavailable

STATE_FILE = "state.sqlite"  # in the cluster's state_dir
COLUMNS = ("id", "role", "state", "pid", "engine pids", "address", "running", "free KV blocks", "seen")


def add_parser(commands: Any) -> None:
    """Adds `status` to the subcommands."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "status",
        help="list the workers of a cluster on this machine",
        description="A worker that hasn't been heard of for the router's time limit is shown as dead, one that starts "
        "after an hour.",
    )
    parser.add_argument("--state-dir", metavar="DIR", type=Path, help="as given to preft serve (default: ~/.preft)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints all workers. Raises Unavailable if there is no state to read."""
    from preft.core.settings import RouterSettings, Settings
    from preft.state import GONE_SECONDS

    folder: Path = args.state_dir or Settings.model_fields["state_dir"].default
    workers = asyncio.run(_workers(folder.expanduser().absolute()))
    now, limit = time.time(), RouterSettings().worker_timeout
    # An engine that loads has no time to say so.
    rows = [_row(worker, now, GONE_SECONDS if worker.state is WorkerState.STARTING else limit) for worker in workers]
    if args.json:
        print(json.dumps({"workers": rows}))
    else:
        print(table([COLUMNS, *map(_cells, rows)]) if rows else "no workers")
    return 0


async def _workers(state_dir: Path) -> list[Worker]:
    from preft.state import open_store

    path = state_dir / STATE_FILE
    if not path.exists():  # opening it would make an empty one
        raise Unavailable(f"no cluster has its state in {state_dir}: name the --state-dir that `preft serve` was given")
    store = open_store(path)
    try:
        return await store.workers()
    finally:
        await store.close()


def _row(worker: Worker, now: float, limit: float) -> dict[str, Any]:
    """One worker as JSON, with the state it is really in: a process that was killed can't say so itself."""
    silent = now - worker.heartbeat
    row = asdict(worker)
    if silent > limit:
        row["state"] = WorkerState.DEAD
    row["seconds_since_heartbeat"] = round(silent, 1)
    return row


def _cells(row: dict[str, Any]) -> list[str]:
    load = row["load"]
    return [
        row["id"],
        row["role"],
        row["state"],
        str(row["pid"]),
        ",".join(map(str, row["engine_pids"])),
        row["address"],
        str(load["running"]),
        f"{load['kv_blocks_free']}/{load['kv_blocks_total']}",
        f"{row['seconds_since_heartbeat']} s ago",
    ]
