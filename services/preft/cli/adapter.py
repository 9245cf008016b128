"""`preft adapter`: verbs for a running server's `/v1/adapters`, and `convert`, which needs no server."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from preft.cli.adapter_add import Entry, add_arguments
from preft.cli.server import add_server, server_of
from preft_loadgen.table import table

COLUMNS = ("name", "kind", "rank", "size", "version", "pinned", "digest", "source")
PAGE = 1000  # the server's maximum


def add_parser(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(
        "adapter", help="add, list, show, pin and remove adapters of a running server; convert others' folders"
    )
    verbs = parser.add_subparsers(title="verbs", dest="verb", required=True, metavar="VERB")
    adding = verbs.add_parser("add", help="check a LoRA or ReFT adapter and serve it under NAME")
    add_arguments(adding)
    listing = verbs.add_parser("list", help="adapters by name")
    listing.add_argument("--search", metavar="TEXT", help="only names that hold TEXT, in any case")
    listing.add_argument("--kind", choices=("lora", "reft", "lora+reft"), help="only these")
    listing.add_argument("--pinned", action="store_true", help="only pinned ones")
    listing.add_argument("--limit", metavar="N", type=_count, help="the first N (default: all)")
    listing.set_defaults(run=list_all)
    named = {
        "show": (show, "one adapter, and which worker has it where"),
        "remove": (remove, "forget an adapter; running requests finish on it"),
        "pin": (pin, "keep an adapter in the host memory of every prefill worker"),
        "unpin": (unpin, "let an adapter leave host memory again when others need the room"),
    }
    served = [adding, listing]
    for verb, (run, text) in named.items():
        one = verbs.add_parser(verb, help=text)
        one.add_argument("name", metavar="NAME")
        one.set_defaults(run=run)
        served.append(one)
    for one in served:
        add_server(one)
        one.add_argument("--json", action="store_true", help="print JSON")
    _add_convert(verbs)


def _add_convert(verbs: Any) -> None:
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


def convert(args: argparse.Namespace) -> int:
    """Writes a ReFT folder from pyreft's files. Raises InvalidAdapter."""
    from preft.convert.pyreft import convert_pyreft  # needs torch

    convert_pyreft(args.source, args.target, args.positions)
    print(f"{args.target} holds the adapter now")
    return 0


def list_all(args: argparse.Namespace) -> int:
    """Prints the catalog, or the entries that match the flags."""
    entries = list(_entries(args))
    if args.json:
        print(json.dumps(entries))
    else:
        print(table([COLUMNS, *map(_row, entries)]) if entries else "no adapters")
    return 0


def show(args: argparse.Namespace) -> int:
    """Prints one entry in full. Raises PreftError if there is none."""
    entry = server_of(args).call("GET", _path(args.name))
    if args.json:
        print(json.dumps(entry))
        return 0
    places, warnings = entry.pop("workers"), entry.pop("warnings")
    print("\n".join([*(f"{key}: {value}" for key, value in entry.items()), *(f"warning: {one}" for one in warnings)]))
    if places:
        print(table([("worker", "state", "prompts"), *([str(value) for value in place.values()] for place in places)]))
    return 0


def remove(args: argparse.Namespace) -> int:
    """Removes one entry. Raises PreftError if there is none."""
    entry = server_of(args).call("DELETE", _path(args.name))
    print(json.dumps(entry) if args.json else f"{args.name} is no longer served")
    return 0


def pin(args: argparse.Namespace) -> int:
    """Pins one adapter. Raises PreftError if there is none, or no room for it."""
    entry = server_of(args).call("PATCH", _path(args.name), {"pinned": True})
    print(json.dumps(entry) if args.json else f"{args.name} stays in host memory now")
    return 0


def unpin(args: argparse.Namespace) -> int:
    """Unpins one adapter. Raises PreftError if there is none."""
    entry = server_of(args).call("PATCH", _path(args.name), {"pinned": False})
    print(json.dumps(entry) if args.json else f"{args.name} may leave host memory now")
    return 0


def _entries(args: argparse.Namespace) -> Iterator[Entry]:
    """The matching entries, fetched page by page."""
    query = {"search": args.search, "kind": args.kind, "pinned": "true" if args.pinned else None}
    given = {name: value for name, value in query.items() if value is not None}
    server, left, after = server_of(args), args.limit, ""
    while left is None or left > 0:
        limit = PAGE if left is None else min(left, PAGE)
        page = server.call("GET", f"/v1/adapters?{urlencode({**given, 'limit': limit, 'after': after})}")
        yield from page["data"]
        if not page["has_more"]:
            return
        after = page["last_id"]
        left = None if left is None else left - len(page["data"])


def _path(name: str) -> str:
    return f"/v1/adapters/{quote(name, safe='', errors='surrogateescape')}"


def _row(entry: Entry) -> list[str]:
    pinned = "yes" if entry["pinned"] else "no"
    shown = {**entry, "size": _size(entry["size"]), "pinned": pinned, "digest": entry["digest"][:12]}
    return [str(shown[column]) for column in COLUMNS]


def _size(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f}{unit}" if unit == "B" else f"{size:.1f}{unit}"
        size /= 1024
    return f"{size:.1f}GiB"


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, not {text!r}")
    return int(text)
