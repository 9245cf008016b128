"""`preft worker`: one worker of a running cluster, without Ray. Owns only the command line."""

from __future__ import annotations

import argparse
import re
from typing import Any

from preft.cli.settings_flags import SHARED, WORKER, add_settings, shared_settings_from
from preft.core.cluster import Role

ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def add_parser(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(
        "worker",
        help="join a cluster as one more worker",
        description="Runs one worker until Ctrl-C or until its engine dies (status 1).",
    )
    parser.add_argument("--role", choices=[role.value for role in Role], required=True, help="kind of worker")
    parser.add_argument("--id", metavar="NAME", type=_id, help="the worker's name, unlike all others (default: random)")
    add_settings(parser, (*WORKER, *SHARED))
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Works until a signal. Raises ConfigError for settings that can't be used, and EngineFailed."""
    settings = shared_settings_from(args)

    from preft.cluster.worker_process import work

    work(settings, Role(args.role), args.id)
    return 0


def _id(text: str) -> str:
    if not ID.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{text!r} must consist of letters, digits, '.', '_' and '-'")
    return text
