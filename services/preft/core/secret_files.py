"""Secrets in files of their own, as Docker and Kubernetes hand them out: `NAME_file` names the file that holds `NAME`.

Owns the reading of such files. No message shows a file's content.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SECRETS = ("state", "cluster_secret")
OTHER_FORM = {f"{name}_file": name for name in SECRETS} | {name: f"{name}_file" for name in SECRETS}
MAX_BYTES = 4096


def with_secrets(settings: Mapping[str, Any]) -> dict[str, Any]:
    """`settings` with the texts of the files that they name. Raises ValueError."""
    read = {}
    for name in SECRETS:
        path = settings.get(f"{name}_file")
        if path is not None and settings.get(name) is not None:
            raise ValueError(f"{name}: {name}_file is set too: set only one of them")
        if path is not None:
            read[name] = _text_of(name, path)
    return {**settings, **read}


def without_other_form(settings: Mapping[str, Any], layer: Mapping[str, Any]) -> dict[str, Any]:
    """`settings` without each secret that `layer`, which goes on top, gives in the other form."""
    return {name: value for name, value in settings.items() if layer.get(OTHER_FORM.get(name, "")) is None}


def _text_of(name: str, path: object) -> str:
    """The file's text without one newline at its end."""
    key = f"{name}_file"
    if not isinstance(path, str | Path) or not str(path):
        raise ValueError(f"{key}: name the file that holds {name}")
    try:
        with open(os.path.expanduser(path), "rb") as file:
            text = file.read(MAX_BYTES + 1).decode()
    except OSError as error:
        raise ValueError(f"{key}: {path} can't be read: {error.strerror}") from error
    except ValueError:  # its text would show a part of the content
        raise ValueError(f"{key}: {path} is not UTF-8 text") from None
    text = text.removesuffix("\n").removesuffix("\r")
    if not text or len(text) > MAX_BYTES or "\n" in text:
        raise ValueError(f"{key}: {path} must hold {name} in one line of at most {MAX_BYTES} bytes")
    return text
