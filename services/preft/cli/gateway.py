"""`preft gateway`: one more gateway of a running cluster. Owns only the command line."""

from __future__ import annotations

import argparse
from typing import Any

from preft.cli.settings_flags import GATEWAY, SHARED, add_adapters, add_settings, shared_settings_from


def add_parser(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(
        "gateway",
        help="join a cluster as one more gateway",
        description="Serves HTTP over all workers in the state store and their adapters, and runs until Ctrl-C.",
    )
    add_settings(parser, (*GATEWAY, *SHARED))
    add_adapters(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Serves until a signal. Raises ConfigError for settings that can't be used."""
    settings = shared_settings_from(args)

    from preft.cluster.join import join

    join(settings)
    return 0
