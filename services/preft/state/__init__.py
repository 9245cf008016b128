"""The cluster's state behind two interfaces: registered workers and the catalog's entries, and the limits' counters."""

from __future__ import annotations

import socket
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from preft.core.errors import ConfigError
from preft.core.limits import LimitCounter
from preft.core.ports import StateStore
from preft.state.memory_limits import MemoryLimits
from preft.state.sqlite import SqliteStore

if TYPE_CHECKING:
    from preft.state.redis_url import RedisUrl

__all__ = ["local_address", "open_limit_counter", "open_store", "shown"]

REDIS = ("redis", "rediss", "unix", "redis+sentinel", "rediss+sentinel")


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
    if scheme in REDIS:
        from preft.state.redis_store import RedisStore  # slow to import, and of use to clusters with Redis alone

        return RedisStore(text, cluster)
    raise ConfigError(
        f"state store {scheme[:40]}://...: give a file path, sqlite:///absolute/path, redis://, rediss://, unix:// or "
        "redis+sentinel://"
    )


def open_limit_counter(url: str | None, cluster: str) -> LimitCounter:
    """The counter that all gateways share in the Redis at `url`; without Redis, this process's own.

    Raises ConfigError for a malformed URL.
    """
    if url is None or _redis_url(url) is None:
        return MemoryLimits()
    from preft.state.redis_limits import RedisLimits

    return RedisLimits(url, cluster)


def shown(url: str) -> str:
    """The store's URL without login and options. Raises ConfigError for a malformed URL."""
    parsed = _redis_url(url)
    return url if parsed is None else parsed.shown


def local_address(url: str) -> str:
    """The address of this machine from which it reaches the store at `url`; 127.0.0.1 for a store on this machine.

    Blocks while the store's name is resolved. Raises ConfigError for a malformed URL.
    """
    parsed = _redis_url(url)
    for host, port in parsed.hosts if parsed is not None else ():
        with suppress(OSError):
            family, kind, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
            with socket.socket(family, kind) as probe:
                probe.connect(place)  # chooses the route, and sends nothing
                return str(probe.getsockname()[0])
    return "127.0.0.1"


def _redis_url(url: str) -> RedisUrl | None:
    if url.partition("://")[0] not in REDIS or "://" not in url:
        return None
    from preft.state.redis_url import parse_redis_url

    return parse_redis_url(url)
