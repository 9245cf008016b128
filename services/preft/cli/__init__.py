"""The `preft` command: reads the arguments, runs one subcommand, turns errors into one sentence and an exit status.

Status 0: success; 1: failure, with advice on stderr; 2: wrong usage. Each subcommand has its own module. No module
with heavy imports is loaded before a subcommand needs it.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

import preft
from preft.cli import adapter, doctor, gateway, key, loadgen, serve, status, worker
from preft.core.environment import check_names
from preft.core.errors import PreftError


def parser() -> argparse.ArgumentParser:
    """The whole command line. Each subcommand sets `run`, a function from the parsed arguments to the exit status."""
    root = argparse.ArgumentParser(prog="preft", description=preft.__doc__)
    root.add_argument("--version", action="version", version=f"preft {preft.__version__}")
    commands = root.add_subparsers(title="commands", dest="command", required=True, metavar="COMMAND")
    for module in (serve, gateway, worker, adapter, key, status, loadgen, doctor):
        module.add_parser(commands)
    return root


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. `argv` excludes the program's name; None means this process's arguments."""
    args = parser().parse_args(argv)
    try:
        check_names(os.environ)
        status: int = args.run(args)
        sys.stdout.flush()
    except PreftError as error:
        print(f"preft: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of stdout has gone, as in `preft status | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status
