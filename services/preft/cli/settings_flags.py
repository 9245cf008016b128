"""The settings of a server command: a YAML file, with the environment on top, and flags on top of both.

Owns the flags' names, help and order. Each command takes the flags of its process. `core.settings` owns the settings.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

from preft.core.environment import API_KEY, config_file, read_environment
from preft.core.errors import ConfigError
from preft.core.secret_files import SECRETS
from preft.core.settings import Settings, load_settings, variable_of

READABLE = "every user of this machine can read flags: put it into the --config file, or into a file of its own and set"


class Flag(NamedTuple):
    """A flag for the setting with this dotted name. A flag without a `metavar` is a switch.

    `name` is the flag's own if two commands have the same flag for different settings.
    """

    setting: str
    metavar: str | None
    help: str
    type: type[int] | type[str] = str
    name: str = ""


FLAGS = {  # by the flag's name in the parsed arguments
    "model": Flag("model", "DIR", "base model: config.json, weights, tokenizer.json"),
    "adapter_dir": Flag(
        "adapter_dir", "DIR", "a folder of adapters, each under its subfolder's name; changes are followed"
    ),
    "prefill": Flag("prefill.replicas", "N", "prefill workers", int),
    "decode": Flag("decode.replicas", "N", "decode workers", int),
    "colocated": Flag("colocated", None, "one kind of worker that prefills and decodes; --prefill says how many"),
    "served_model_name": Flag("served_model_name", "S", "the base model's name in the API"),
    "host": Flag("host", "H", "address to listen on"),
    "port": Flag("port", "P", "HTTP port; 0 takes any free one", int),
    "grpc_port": Flag("grpc_port", "P", "port of the public gRPC service; off by default", int),
    "tool_call_parser": Flag("tool_call_parser", "NAME", "vLLM's parser of tool calls, such as hermes; off by default"),
    "reasoning_parser": Flag("reasoning_parser", "NAME", "vLLM's parser of reasoning, such as qwen3; off by default"),
    "dtype": Flag("dtype", "D", "auto, float32, bfloat16 or float16"),
    "max_model_len": Flag("max_model_len", "N", "longest prompt + output, in tokens", int),
    "state_dir": Flag("state_dir", "DIR", "where adapters and the cluster's state are kept"),
    "state": Flag("state", "URL", "state store: a file, or redis://host:6379/0 for many machines; no password here"),
    "worker_host": Flag("worker.host", "H", "address to listen on (default: 127.0.0.1)", name="host"),
    "worker_port": Flag("worker.port", "P", "port to listen on (default: any free one)", int, name="port"),
    "advertise_host": Flag(
        "worker.advertise_host", "H", "address or DNS name for the cluster's other processes (default: that of --host)"
    ),
}
WORKER_ALONE = ("worker_host", "worker_port", "advertise_host")
SERVE = tuple(name for name in FLAGS if name not in WORKER_ALONE)
GATEWAY = (
    *("model", "adapter_dir", "served_model_name", "host", "port", "grpc_port", "max_model_len"),
    *("tool_call_parser", "reasoning_parser"),
)
WORKER = (*WORKER_ALONE, "model", "dtype", "max_model_len")
SHARED = ("state_dir", "state")


def option(name: str) -> str:
    """The flag as it is typed."""
    return f"--{(FLAGS[name].name or name).replace('_', '-')}"


def add_settings(parser: argparse.ArgumentParser, flags: Collection[str]) -> None:
    """Adds these FLAGS, and `--config` and `--set` for all other settings."""
    for name, flag in FLAGS.items():
        if name in flags:
            kind: dict[str, Any] = {"metavar": flag.metavar, "type": flag.type}
            if flag.metavar is None:
                kind = {"action": "store_const", "const": True}
            parser.add_argument(option(name), dest=name, help=flag.help, **kind)
    parser.add_argument(
        "--config", metavar="F", type=Path, help="YAML file with any of the settings (default: PREFT_CONFIG)"
    )
    parser.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        type=_assignment,
        default=[],
        help="any other setting by its dotted name, such as --set decode.max_num_seqs=128; repeatable",
    )


def add_adapters(parser: argparse.ArgumentParser) -> None:
    """Adds `--adapter`."""
    parser.add_argument(
        "--adapter",
        metavar="NAME=SOURCE",
        action="append",
        type=_adapter,
        default=[],
        help="adapter folder or URI (s3://, gs://, https://, hf://); repeatable",
    )


def settings_from(args: argparse.Namespace) -> Settings:
    """The settings of a server process. Raises ConfigError for settings that can't be used."""
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # gRPC would print; it reads this variable at import
    overrides, environment = overrides_from(args), read_environment(os.environ)
    config = args.config or config_file(os.environ)
    if config is None and "model" not in overrides and ("model",) not in environment:
        raise ConfigError("name the base model's folder with --model DIR, or a file with all settings with --config F")
    for variable in (*(variable_of((secret,)) for secret in SECRETS), API_KEY):
        os.environ.pop(variable, None)  # so that Ray and engines, which this process starts, don't inherit them
    return load_settings(config, overrides, environment)


def shared_settings_from(args: argparse.Namespace) -> Settings:
    """As `settings_from`, for a process that joins others. Raises ConfigError also without a state store."""
    settings = settings_from(args)
    if settings.state is None:
        raise ConfigError("state: name the state store that the cluster's processes share, with --state URL")
    return settings


def overrides_from(args: argparse.Namespace) -> dict[str, Any]:
    """The flags as nested settings: `--set` first, the named flags on top. Raises ConfigError."""
    from preft.core.yaml_text import read_value

    overrides: dict[str, Any] = {}
    for key, text in args.set:
        if key == "cluster_secret":
            raise ConfigError(f"cluster_secret: {READABLE} cluster_secret_file")
        _put(overrides, key, read_value(text, key))
    for name, flag in FLAGS.items():
        value = getattr(args, name, None)
        if value is not None:
            _put(overrides, flag.setting, value)
    if _has_password(overrides.get("state")):
        raise ConfigError(f"state: {READABLE} state_file")
    folders: dict[str, str] = {}
    for name, folder in getattr(args, "adapter", ()):
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
