"""`preft adapter`: add, list, show and remove, over the `/v1/adapters` of a running server; and convert."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any
from urllib.parse import quote

from preft.adapters.catalog import NOT_PREFILL_ONLY
from preft.cli.server import Server, add_url
from preft.cli.table import table
from preft.core.errors import InvalidAdapter, ModelNotFound

COLUMNS = ("name", "kind", "rank", "digest", "source")


def add_parser(commands: Any) -> None:
    """Adds `adapter` and its verbs to the subcommands."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "adapter", help="add, list, show and remove adapters of a running server; convert others' folders"
    )
    verbs = parser.add_subparsers(title="verbs", dest="verb", required=True, metavar="VERB")
    adding = verbs.add_parser("add", help="check a LoRA or ReFT folder and serve it under NAME")
    adding.add_argument("name", metavar="NAME")
    adding.add_argument("folder", metavar="DIR", help="a folder that the server can read")
    adding.add_argument("--replace", action="store_true", help="NAME may hold other weights; new requests get these")
    adding.set_defaults(run=add)
    listing = verbs.add_parser("list", help="all adapters, by name")
    listing.set_defaults(run=list_all)
    showing = verbs.add_parser("show", help="one adapter")
    showing.add_argument("name", metavar="NAME")
    showing.set_defaults(run=show)
    removing = verbs.add_parser("remove", help="forget an adapter; running requests finish on it")
    removing.add_argument("name", metavar="NAME")
    removing.set_defaults(run=remove)
    converting = verbs.add_parser("convert", help="make a ReFT folder from a folder that pyreft saved")
    converting.add_argument("source", metavar="SOURCE", type=Path, help="pyreft's folder: config.json, intkey_*.bin")
    converting.add_argument("target", metavar="TARGET", type=Path, help="folder to write")
    converting.add_argument(
        "--positions",
        metavar="P",
        required=True,
        help="prompt positions that it was trained for, which pyreft doesn't save: all, or such as f2, l3, f2+l3",
    )
    converting.set_defaults(run=convert)
    for verb in (adding, listing, showing, removing):
        add_url(verb)
        verb.add_argument("--json", action="store_true", help="print JSON")


def add(args: argparse.Namespace) -> int:
    """Adds the folder. Raises PreftError if the server refuses it."""
    folder = os.path.abspath(os.path.expanduser(args.folder))
    if not os.path.isdir(folder):
        raise InvalidAdapter(f"{folder} is not a folder: name the one with the adapter's configuration and weights")
    body = {"name": args.name, "path": folder, "replace": args.replace}
    entry = Server(args.url).call("POST", "/v1/adapters", body)
    print(json.dumps(entry) if args.json else f"{entry['name']} is served now (digest {entry['digest'][:12]})")
    if not entry["prefill_only"]:
        print(f"warning: {entry['name']}: {NOT_PREFILL_ONLY}", file=sys.stderr)
    return 0


def convert(args: argparse.Namespace) -> int:
    """Writes a ReFT folder from what pyreft saved. Raises InvalidAdapter."""
    from preft.convert.pyreft import convert_pyreft  # needs torch

    convert_pyreft(args.source, args.target, args.positions)
    print(f"{args.target} holds the adapter now")
    return 0


def list_all(args: argparse.Namespace) -> int:
    """Prints the catalog."""
    entries = _entries(args.url)
    if args.json:
        print(json.dumps(entries))
    else:
        print(table([COLUMNS, *map(_row, entries)]) if entries else "no adapters")
    return 0


def show(args: argparse.Namespace) -> int:
    """Prints one entry in full. Raises ModelNotFound."""
    for entry in _entries(args.url):
        if entry["name"] == args.name:
            lines = [f"{key}: {value}" for key, value in entry.items()]
            print(json.dumps(entry) if args.json else "\n".join(lines))
            return 0
    raise ModelNotFound(f"there is no adapter {args.name!r}: `preft adapter list` shows all")


def remove(args: argparse.Namespace) -> int:
    """Removes one entry. Raises PreftError if there is none."""
    entry = Server(args.url).call("DELETE", f"/v1/adapters/{quote(args.name, safe='')}")
    print(json.dumps(entry) if args.json else f"{args.name} is no longer served")
    return 0


def _entries(url: str) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = Server(url).call("GET", "/v1/adapters")["data"]
    return entries


def _row(entry: dict[str, Any]) -> list[str]:
    return [str(entry.get(column, ""))[: 12 if column == "digest" else None] for column in COLUMNS]
