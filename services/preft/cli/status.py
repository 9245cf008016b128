"""`preft status`: a cluster's workers, as its server sees them or as a state folder records them."""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from pathlib import Path
from typing import Any

from preft.cli.server import Server, add_url
from preft.cli.table import table
from preft.core.cluster import Worker, WorkerState, worker_row
from preft.core.errors import PreftError, Unavailable

STATE_FILE = "state.sqlite"  # in the cluster's state_dir
COLUMNS = ("id", "role", "state", "pid", "engine pids", "address", "running", "free KV blocks", "seen")


def add_parser(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(
        "status",
        help="list the workers of a cluster",
        description="Asks the server at --url. With --state-dir no server is asked: the list is what the clusters that "
        "use this folder have written down. There a worker that was silent for the router's time limit is shown as "
        "dead, a worker that starts after an hour.",
    )
    add_url(parser)
    parser.add_argument(
        "--state-dir", metavar="DIR", type=Path, help="read this folder instead, as given to preft serve"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints all workers. Raises Unavailable if no server answers, or the folder has no state."""
    rows = _asked(args.url) if args.state_dir is None else _remembered(args.state_dir.expanduser().absolute())
    if args.json:
        print(json.dumps({"workers": rows}))
    else:
        print(table([COLUMNS, *map(_cells, rows)]) if rows else "no workers")
    return 0


def _asked(url: str) -> list[dict[str, Any]]:
    answer = Server(url).call("GET", "/v1/workers")
    if not isinstance(answer, dict) or not isinstance(answer.get("workers"), list):
        raise PreftError(f"{url}/v1/workers didn't answer with workers: is this a PreFT server?")
    rows: list[dict[str, Any]] = answer["workers"]
    return rows


def _remembered(state_dir: Path) -> list[dict[str, Any]]:
    from preft.core.settings import RouterSettings
    from preft.state import GONE_SECONDS

    now, limit = time.time(), RouterSettings().worker_timeout
    # A worker writes no heartbeat while its engine loads.
    return [
        _row(worker, now, GONE_SECONDS if worker.state is WorkerState.STARTING else limit)
        for worker in asyncio.run(_workers(state_dir))
    ]


async def _workers(state_dir: Path) -> list[Worker]:
    from preft.state import open_store

    path = state_dir / STATE_FILE
    if not path.exists():  # opening would make an empty file
        raise Unavailable(f"no cluster has its state in {state_dir}: name the --state-dir that `preft serve` was given")
    store = open_store(path)
    try:
        return await store.workers()
    finally:
        await store.close()


def _row(worker: Worker, now: float, limit: float) -> dict[str, Any]:
    """One worker as JSON. A worker whose heartbeat is too old counts as dead: a killed process can't report its end."""
    row = worker_row(worker, now)
    if now - worker.heartbeat > limit:
        row["state"] = WorkerState.DEAD
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
