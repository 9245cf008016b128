"""The cluster's state behind one interface: registered workers and the adapter catalog's entries."""

from __future__ import annotations

from pathlib import Path

from preft.core.errors import ConfigError
from preft.core.ports import StateStore
from preft.state.sqlite import SqliteStore

__all__ = ["open_store"]


def open_store(url: str | Path, cluster: str = "default") -> StateStore:
    """The store of one `cluster` at `url`: a file path, `sqlite:///absolute/path`, or a URL of Redis.

    Call inside the event loop that uses the store. A missing file is created, which blocks for some milliseconds, or
    until 10 MiB are on the disk. A Redis server isn't asked before the first call. Raises ConfigError if the URL is
    malformed, or the file can't be used or belongs to another cluster. The message holds no password.
    """
    text = str(url)
    scheme, separator, rest = text.partition("://")
    if not separator:
        return SqliteStore(Path(text), cluster)
    if scheme == "sqlite" and rest.startswith("/"):
        return SqliteStore(Path(rest), cluster)
    if scheme in ("redis", "rediss", "unix", "redis+sentinel", "rediss+sentinel"):
        from preft.state.redis_store import RedisStore  # slow to import, and of use to clusters with Redis alone

        return RedisStore(text, cluster)
    raise ConfigError(
        f"state store {scheme[:40]}://...: give a file path, sqlite:///absolute/path, redis://, rediss://, unix:// or "
        "redis+sentinel://"
    )
