"""`preft key`: makes an API key, prints its entry for the file of keys to stdout, and the key itself to stderr."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from preft.core.errors import ConfigError
from preft.core.limits import Limit

LIMITS = (*(limit.value for limit in Limit), "adapter_bytes")


def add_parser(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(
        "key",
        help="make an API key",
        description="Prints the key's entry for the file that the setting api_keys names. The entry holds a hash of the"
        " key. The key itself is shown once, on stderr: `preft key alice >> api_keys.yaml`.",
    )
    parser.add_argument("name", metavar="NAME", help="the key's name, for logs, limits and records")
    parser.add_argument("--tenant", metavar="T", default="", help="whose key it is (default: no tenant)")
    parser.add_argument(
        "--adapters",
        metavar="PATTERN",
        action="append",
        help="adapters that the key may use, such as 'team-*'; repeatable (default: all)",
    )
    parser.add_argument("--admin", action="store_true", help="the key may add, replace, remove and pin adapters")
    for limit in LIMITS:
        parser.add_argument(f"--{limit.replace('_', '-')}", metavar="N", help="the most (default: no limit)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints a new key. Raises ConfigError for values that the server would refuse."""
    import yaml

    from preft.core.yaml_text import read_value
    from preft.gateway.access.keys import checked_entry, hash_of, new_secret

    secret = new_secret()
    entry: dict[str, Any] = {"sha256": hash_of(secret)}
    given = {"tenant": args.tenant, "adapters": args.adapters, "admin": args.admin}
    entry |= {name: value for name, value in given.items() if value}
    for limit in LIMITS:
        if (text := getattr(args, limit)) is not None:
            entry[limit] = read_value(text, f"--{limit.replace('_', '-')}")
    try:
        checked_entry(Path("--"), args.name, entry)
    except ConfigError as error:
        raise ConfigError(str(error).removeprefix("api_keys: --: ")) from None
    print(yaml.safe_dump({args.name: entry}, sort_keys=False, width=1000), end="")
    sys.stdout.flush()
    print(f"The key, which nobody can read again later:\n{secret}", file=sys.stderr)
    return 0
