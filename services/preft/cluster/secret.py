"""Finds the cluster's secret: the setting, else a file in `state_dir` that the first process makes."""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from pathlib import Path

from preft.core.errors import ConfigError
from preft.core.settings import Settings
from preft.rpc.secret import ClusterSecret
from preft.rpc.tls import Certificates

FILE = "cluster_secret"


def read_secret(settings: Settings) -> str:
    """The secret's text. Raises ConfigError if its file can't be used, or users other than its owner may read it."""
    if settings.cluster_secret is not None:
        return settings.cluster_secret.get_secret_value()
    return stored_secret(settings.state_dir)


def stored_secret(state_dir: Path) -> str:
    """The secret in the file; makes a missing file. Raises as `read_secret`."""
    path = state_dir / FILE
    try:
        _make(path)
        with open(path, encoding="ascii") as file:
            mode, secret = os.fstat(file.fileno()).st_mode, file.read().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cluster_secret: {path} can't be used: {error}") from error
    if mode & 0o077:
        raise ConfigError(f"cluster_secret: other users may read {path}: remove it, and the next start makes another")
    if len(secret) < 16:
        raise ConfigError(f"cluster_secret: {path} holds no secret: remove it, and the next start makes another")
    return secret


def cluster_secret(settings: Settings) -> ClusterSecret:
    """The secret and the certificates in the form for channels and servers.

    Raises ConfigError as `read_secret` and `Certificates` do.
    """
    certificates = None if settings.tls is None else Certificates(settings.tls)
    return ClusterSecret(read_secret(settings), certificates)


def _make(path: Path) -> None:
    """Makes a missing secret. The file gets its name only when complete: other processes may read it at once."""
    if path.exists():
        return
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    unfinished = path.with_name(f"{FILE}.{secrets.token_hex(8)}")
    try:
        descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with open(descriptor, "w", encoding="ascii") as file:
            file.write(secrets.token_hex(32))
        with suppress(FileExistsError):  # another process was quicker
            os.link(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
