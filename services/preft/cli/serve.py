"""`preft serve`: one cluster from a YAML file with flags on top. Owns only the flags."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from preft.core.errors import ConfigError

FLAGS = {  # flag's name in the parsed arguments -> dotted key of the setting
    "model": "model",
    "served_model_name": "served_model_name",
    "host": "host",
    "port": "port",
    "grpc_port": "grpc_port",
    "dtype": "dtype",
    "max_model_len": "max_model_len",
    "state_dir": "state_dir",
    "state": "state",
    "adapter_dir": "adapter_dir",
    "prefill": "prefill.replicas",
    "decode": "decode.replicas",
    "colocated": "colocated",
}
READABLE = "every user of this machine can read flags"


def add_parser(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(
        "serve",
        help="serve a base model and its adapters",
        description="Starts the workers and the HTTP server, and runs until Ctrl-C.",
    )
    parser.add_argument("--model", metavar="DIR", help="base model: config.json, weights, tokenizer.json")
    parser.add_argument(
        "--adapter",
        metavar="NAME=SOURCE",
        action="append",
        type=_adapter,
        default=[],
        help="adapter folder or URI (s3://, gs://, https://, hf://); repeatable",
    )
    parser.add_argument(
        "--adapter-dir",
        metavar="DIR",
        help="a folder of adapters, each under its subfolder's name; changes are followed",
    )
    parser.add_argument("--prefill", metavar="N", type=int, help="prefill workers")
    parser.add_argument("--decode", metavar="N", type=int, help="decode workers")
    parser.add_argument(
        "--colocated",
        action="store_const",
        const=True,
        help="one kind of worker that prefills and decodes; --prefill says how many",
    )
    parser.add_argument("--served-model-name", metavar="S", help="the base model's name in the API")
    parser.add_argument("--host", metavar="H", help="address to listen on")
    parser.add_argument("--port", metavar="P", type=int, help="HTTP port; 0 takes any free one")
    parser.add_argument("--grpc-port", metavar="P", type=int, help="port of the public gRPC service; off by default")
    parser.add_argument("--dtype", metavar="D", help="auto, float32, bfloat16 or float16")
    parser.add_argument("--max-model-len", metavar="N", type=int, help="longest prompt + output, in tokens")
    parser.add_argument("--state-dir", metavar="DIR", help="where adapters and the cluster's state are kept")
    parser.add_argument(
        "--state", metavar="URL", help="state store: a file, or redis://host:6379/0 for many machines; no password here"
    )
    parser.add_argument("--config", metavar="F", type=Path, help="YAML file with any of the settings")
    parser.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        type=_assignment,
        default=[],
        help="any other setting by its dotted name, such as --set decode.max_num_seqs=128; repeatable",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Serves until a signal. Raises ConfigError for settings that can't be used."""
    from preft.core.settings import load_settings

    overrides = overrides_from(args)
    if args.config is None and "model" not in overrides:
        raise ConfigError("name the base model's folder with --model DIR, or a file with all settings with --config F")
    settings = load_settings(args.config, overrides)

    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # gRPC would print; it reads this variable at import
    from preft.cluster.serve import serve

    serve(settings)
    return 0


def overrides_from(args: argparse.Namespace) -> dict[str, Any]:
    """The flags as nested settings: `--set` first, the named flags on top. Raises ConfigError."""
    overrides: dict[str, Any] = {}
    for key, text in args.set:
        if key == "cluster_secret":
            raise ConfigError(f"cluster_secret: {READABLE}: put it into the --config file")
        _put(overrides, key, _value(key, text))
    if args.colocated and args.decode is not None:
        raise ConfigError("--decode: a colocated cluster has no decode workers; --prefill says how many workers it has")
    for flag, key in FLAGS.items():
        value = getattr(args, flag)
        if value is not None:
            _put(overrides, key, value)
    if _has_password(overrides.get("state")):
        raise ConfigError(f"state: {READABLE}: put a URL with a password into the --config file")
    folders: dict[str, str] = {}
    for name, folder in args.adapter:
        if name in folders:
            raise ConfigError(f"--adapter: {name!r} is given twice")
        folders[name] = folder
    if folders:
        given = overrides.get("adapters", {})
        if not isinstance(given, dict):
            raise ConfigError("--adapter: adapters is already set to a single value")
        overrides["adapters"] = {**given, **folders}
    return overrides


def _has_password(state: object) -> bool:
    login, at, _ = str(state).partition("://")[2].rpartition("@")
    return bool(at and ":" in login) or "password=" in str(state)


def _put(overrides: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    place = overrides
    for parent in parents:
        place = place.setdefault(parent, {})
        if not isinstance(place, dict):
            raise ConfigError(f"{key}: {parent} is already set to a single value")
    place[last] = value


def _value(key: str, text: str) -> Any:
    """`text` as YAML: 3 is a number, null is None, [a, b] is a list."""
    import yaml

    from preft.core.yaml_text import read_yaml

    try:
        return read_yaml(text, key)
    except yaml.YAMLError as error:
        raise ConfigError(f"{key}: {text!r} is not a YAML value") from error


def _adapter(text: str) -> tuple[str, str]:
    name, equals, folder = text.partition("=")
    if not (name and equals and folder):
        raise argparse.ArgumentTypeError(f"{text!r} must look like NAME=SOURCE")
    return name, folder


def _assignment(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not all(key.split(".")):
        raise argparse.ArgumentTypeError(f"{text!r} must look like KEY=VALUE, such as decode.max_num_seqs=128")
    return key, value
