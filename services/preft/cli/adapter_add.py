"""`preft adapter add`: one adapter from a folder, a URI or this machine's disk, or every subfolder of a folder."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any
from urllib.parse import quote

from preft.cli.packing import Package
from preft.cli.progress import Tell, progress_bar
from preft.cli.server import Server, server_of
from preft.core.errors import InvalidAdapter, PreftError

AT_ONCE = 8

Entry = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `add`. Wrong combinations end the program with the usage and status 2."""
    parser.add_argument("name", metavar="NAME", nargs="?")
    parser.add_argument(
        "source",
        metavar="SOURCE",
        nargs="?",
        help="a folder that the server can read, or a URI: s3://, gs://, hf://, https://, http://, file://",
    )
    parser.add_argument("--all", metavar="DIR", type=Path, help="add every subfolder of DIR, each under its own name")
    parser.add_argument("--replace", action="store_true", help="NAME may hold other weights; new requests get these")
    parser.add_argument("--upload", action="store_true", help="send the folder, which the server needn't see")

    def run(args: argparse.Namespace) -> int:
        if args.all is not None and args.name is not None:
            parser.error("name one adapter and its source, or --all DIR")
        if args.all is None and args.source is None:
            parser.error("NAME and SOURCE are needed, or --all DIR")
        return add_one(args) if args.all is None else add_all(args)

    parser.set_defaults(run=run)


def add_one(args: argparse.Namespace) -> int:
    """Adds one adapter. Raises PreftError if the server refuses it."""
    with progress_bar(args.name, "B") as tell:
        entry = _add(server_of(args), args.name, args.source, tell, replace=args.replace, upload=args.upload)
    print(json.dumps(entry) if args.json else f"{entry['name']} is served now (digest {entry['digest'][:12]})")
    _warn([entry])
    return 0


def add_all(args: argparse.Namespace) -> int:
    """Adds each subfolder; returns 1 if one fails. Raises PreftError if there are no subfolders or no server."""
    server = server_of(args)
    folders = _subfolders(args.all)
    server.call("GET", "/v1/adapters?limit=1")  # without a server: one error, not one per folder
    added: list[Entry] = []
    failed: dict[str, str] = {}

    def add(folder: Path) -> Entry:
        return _add(server, folder.name, str(folder), _untold, replace=args.replace, upload=args.upload)

    with progress_bar("adding", "adapter") as tell, ThreadPoolExecutor(AT_ONCE) as pool:
        futures = {pool.submit(add, folder): folder.name for folder in folders}
        try:
            for future in as_completed(futures):
                try:
                    added.append(future.result())
                except PreftError as error:
                    failed[futures[future]] = str(error)
                tell(len(added) + len(failed), len(folders))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # Ctrl-C waits only for running additions
    added.sort(key=lambda entry: str(entry["name"]))
    if args.json:
        failures = [{"name": name, "error": why} for name, why in sorted(failed.items())]
        print(json.dumps({"added": added, "failed": failures}))
    else:
        print(f"{len(added)} of {len(folders)} adapters are served now")
    _warn(added)
    for name, why in sorted(failed.items()):
        print(f"failed: {name}: {why}", file=sys.stderr)
    return 1 if failed else 0


def _add(server: Server, name: str, source: str, tell: Tell, *, replace: bool, upload: bool) -> Entry:
    if upload:
        if "://" in source:
            raise InvalidAdapter("--upload sends a folder of this machine: leave it out, then the server fetches it")
        package = Package.of(Path(_folder(source)))
        path = f"/v1/adapters/{quote(name, safe='', errors='surrogateescape')}?replace={'true' if replace else 'false'}"
        entry: Entry = server.upload(path, _told(package, tell), package.size)
        return entry
    body = {"name": name, "source": source if "://" in source else _folder(source), "replace": replace, "stream": True}
    for event in server.events("POST", "/v1/adapters", body):
        if "adapter" in event:
            return dict(event["adapter"])
        tell(event["bytes"], event["total"])
    raise PreftError(f"the server didn't say whether it added {name}: `preft adapter show {name}` tells")


def _folder(source: str) -> str:
    folder = os.path.abspath(os.path.expanduser(source))
    if not os.path.isdir(folder):
        raise InvalidAdapter(f"{folder} is not a folder: name the one with the adapter's configuration and weights")
    return folder


def _subfolders(folder: Path) -> list[Path]:
    try:
        found = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError as error:
        raise InvalidAdapter(f"{folder} can't be read: {error.strerror}") from error
    if not found:
        raise InvalidAdapter(f"{folder} has no subfolders: name the folder that has one for each adapter")
    return found


def _told(package: Package, tell: Tell) -> Iterator[bytes]:
    sent = 0
    for part in package:
        yield part
        sent += len(part)
        tell(sent, package.size)


def _untold(done: int, total: int | None) -> None:
    """Progress of adapters without a bar of their own."""


def _warn(entries: Sequence[Entry]) -> None:
    """Prints each warning once, with the first adapter that has it."""
    named: dict[str, list[str]] = {}
    for entry in entries:
        for warning in entry["warnings"]:
            named.setdefault(warning, []).append(entry["name"])
    for warning, names in named.items():
        others = f" and {len(names) - 1} others" if len(names) > 1 else ""
        print(f"warning: {names[0]}{others}: {warning}", file=sys.stderr)
