"""Settings files as the product reads them, with the secrets' files elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from preft.core.environment import check_names, read_environment
from preft.core.settings import Settings, load_settings

SECRETS = {"state": "rediss://user:password@redis.example.com:6379/0\n", "cluster_secret": "0123456789abcdef\n"}


def read_deployed(path: Path, folder: Path, environment: Mapping[str, str] | None = None) -> Settings:
    """The settings in the file at `path` under `environment`. `folder` gets the secrets that the file names."""
    given = yaml.safe_load(path.read_text())
    elsewhere: dict[str, Any] = {}
    for name, text in SECRETS.items():
        if f"{name}_file" in given:
            (folder / name).write_text(text)
            elsewhere[f"{name}_file"] = str(folder / name)
    check_names(environment or {})
    return load_settings(path, elsewhere, read_environment(environment or {}))
