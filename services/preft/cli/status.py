"""`preft status`: a cluster's workers, as one of its gateways sees them."""

from __future__ import annotations

import argparse
import json
from typing import Any

from preft.cli.server import add_server, server_of
from preft.core.errors import PreftError
from preft_loadgen.table import table

COLUMNS = ("id", "role", "state", "pid", "engine pids", "address", "running", "free KV blocks", "heard")


def add_parser(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(
        "status",
        help="list the workers of a cluster",
        description="Asks the server at --url: any gateway of the cluster.",
    )
    add_server(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints all workers. Raises Unavailable if no server answers."""
    answer = server_of(args).call("GET", "/v1/workers")
    if not isinstance(answer, dict) or not isinstance(answer.get("workers"), list):
        raise PreftError(f"{args.url}/v1/workers didn't answer with workers: is this a PreFT server?")
    rows: list[dict[str, Any]] = answer["workers"]
    if args.json:
        print(json.dumps({"workers": rows}))
    else:
        print(table([COLUMNS, *map(_cells, rows)]) if rows else "no workers")
    return 0


def _cells(row: dict[str, Any]) -> list[str]:
    status = row["status"]
    return [
        row["id"],
        row["role"],
        row["state"],
        str(row["pid"]),
        ",".join(map(str, row["engine_pids"])),
        row["address"],
        str(status["running"]),
        f"{row['kv_blocks'] - status['kv_blocks_used']}/{row['kv_blocks']}",
        f"{row['seconds_since_heard']} s ago",
    ]
