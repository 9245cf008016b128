"""The environment variables of PreFT Serve: `PREFT_ROUTER__MAX_QUEUE=7` sets `router.max_queue`, and so on.

Owns the variables' names and how their texts are read. `core.settings` checks the values.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, SecretStr

from preft.core.errors import ConfigError
from preft.core.settings import Key, Settings, variable_of

PREFIX = "PREFT_"
CONFIG, URL, API_KEY = "PREFT_CONFIG", "PREFT_URL", "PREFT_API_KEY"
OTHERS = {
    CONFIG,  # the settings file, for commands without --config
    URL,  # the server's address, for commands without --url
    API_KEY,  # the key that commands show to the server, without --api-key
    "PREFT_KERNEL_TUNING",  # a folder with tuning files of the GPU kernels
    "PREFT_SERVED_BY",  # marks the processes that a benchmark has started
}
"""The variables that are no settings."""

# Kubernetes gives every container such variables for every Service, and a Service may well be named "preft".
_OF_A_SERVICE = re.compile(
    r"PREFT_(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)"
)
_ADDRESS_OF_A_SERVICE = re.compile(r"(tcp|udp|sctp)://")


def read_environment(environ: Mapping[str, str]) -> dict[Key, Any]:
    """The settings in the environment, by their path of names. Raises ConfigError for a text that isn't YAML.

    Text settings take a variable's text as it is. All other values are YAML, as in the settings file, and `null`
    is none for every setting.
    """
    from preft.core.yaml_text import read_value

    found: dict[Key, Any] = {}
    for key, is_text in _settings(Settings):
        variable = variable_of(key)
        text = value_of(environ, variable)
        if text is not None:
            found[key] = text if is_text and text != "null" else read_value(text, variable)
    return found


def value_of(environ: Mapping[str, str], variable: str) -> str | None:
    """The variable's text; None for a missing or empty variable, and for one that Kubernetes has made of a Service."""
    text = environ.get(variable)
    return text if text and not _ADDRESS_OF_A_SERVICE.match(text) else None


def config_file(environ: Mapping[str, str]) -> Path | None:
    """The settings file that the environment names."""
    text = value_of(environ, CONFIG)
    return None if text is None else Path(text)


def check_names(environ: Mapping[str, str]) -> None:
    """Raises ConfigError if a variable begins with PREFT_ and means nothing."""
    known = {*(variable_of(key) for key, _ in _settings(Settings)), *OTHERS}
    ends = [name.removeprefix(PREFIX) for name in known]
    for name in sorted(environ.keys() - known):
        if not name.startswith(PREFIX) or _is_of_a_service(name, environ[name]):
            continue
        near = get_close_matches(name.removeprefix(PREFIX).upper(), ends, n=1, cutoff=0.7)
        advice = (
            f"did you mean {PREFIX}{near[0]}?" if near else "unset it, or see docs/configuration.md for the settings"
        )
        raise ConfigError(f"{name}: there is no such setting and no such environment variable of PreFT Serve: {advice}")


def _is_of_a_service(name: str, text: str) -> bool:
    return _OF_A_SERVICE.fullmatch(name) is not None or (
        name.endswith("_PORT") and _ADDRESS_OF_A_SERVICE.match(text) is not None
    )


def _settings(model: type[BaseModel], group: Key = ()) -> Iterator[tuple[Key, bool]]:
    """Path of names -> whether the setting is a text."""
    for name, field in model.model_fields.items():
        kinds = get_args(field.annotation) or (field.annotation,)
        inner = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if inner:  # a group, or an optional group
            yield from _settings(inner[0], (*group, name))
        else:
            yield (*group, name), _is_text(field.annotation)


def _is_text(annotation: Any) -> bool:
    kind, parts = get_origin(annotation), get_args(annotation)
    if kind is Literal:
        return isinstance(parts[0], str)
    if kind is Annotated:
        return _is_text(parts[0])
    if type(None) in parts:  # an optional setting
        return any(map(_is_text, parts))
    return annotation in (str, Path, SecretStr)
