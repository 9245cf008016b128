"""`preft serve`: one cluster from a YAML file with flags on top. Owns only the command line."""

from __future__ import annotations

import argparse
from typing import Any

from preft.cli.settings_flags import SERVE, add_adapters, add_settings, settings_from
from preft.core.errors import ConfigError


def add_parser(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(
        "serve",
        help="serve a base model and its adapters",
        description="Starts the workers and the HTTP server, and runs until Ctrl-C.",
    )
    add_settings(parser, SERVE)
    add_adapters(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Serves until a signal. Raises ConfigError for settings that can't be used."""
    if args.colocated and args.decode is not None:
        raise ConfigError("--decode: a colocated cluster has no decode workers; --prefill says how many workers it has")
    settings = settings_from(args)

    from preft.cluster.serve import serve

    serve(settings)
    return 0
