"""URLs of a Redis server, of a Redis behind Sentinels, and the client for each.

    redis://[user:password@]host[:port][/database]        rediss:// with TLS
    unix://[user:password@]/path/of/socket[?db=database]
    redis+sentinel://[user:password@]host[:port][,host[:port]...]/service[/database]        rediss+sentinel:// with TLS

User, password and path may hold percent-encoded characters. No error and no text made here holds a password.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl, unquote

from redis.asyncio import ConnectionPool, Redis, Sentinel, SSLConnection, UnixDomainSocketConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from preft.core.errors import ConfigError

SCHEMES = ("redis", "rediss", "unix", "redis+sentinel", "rediss+sentinel")
PORT, SENTINEL_PORT = 6379, 26379
TLS_OPTIONS = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "ssl_cert_reqs", "ssl_check_hostname")
OPTIONS = ("db", *TLS_OPTIONS, "sentinel_username", "sentinel_password")
URL = re.compile(r"(?P<scheme>[a-z+]+)://(?:(?P<login>.*)@)?(?P<hosts>[^/?]*)(?:/(?P<path>[^?]*))?(?:\?(?P<query>.*))?")
HOST = re.compile(r"(?P<host>\[[0-9a-fA-F:.]+\]|[^:\[\]]+)(?::(?P<port>\d{1,5}))?")


@dataclass(frozen=True, slots=True)
class RedisUrl:
    """A parsed URL. `shown` is the URL without login and options, for messages."""

    scheme: str
    hosts: tuple[tuple[str, int], ...]  # of the server, or of the Sentinels
    path: str  # of a Unix socket
    service: str  # at the Sentinels
    database: int
    username: str
    password: str = field(repr=False)
    options: dict[str, str] = field(repr=False)

    @property
    def shown(self) -> str:
        if self.scheme == "unix":
            return f"unix://{self.path}?db={self.database}"
        hosts = ",".join(f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in self.hosts)
        return "/".join(filter(None, [f"{self.scheme}://{hosts}", self.service, str(self.database)]))

    def without_secrets(self, text: str) -> str:
        """`text`, with passwords masked."""
        for secret in (self.password, self.options.get("sentinel_password", "")):
            text = text.replace(secret, "***") if secret else text
        return text


def parse_redis_url(text: str) -> RedisUrl:
    """Raises ConfigError. The message doesn't quote `text`, because a malformed URL may have its password anywhere."""
    found = URL.fullmatch(text)
    if found is None or found["scheme"] not in SCHEMES:
        raise ConfigError(f"state: a Redis URL starts with {'://, '.join(SCHEMES)}://")
    scheme, is_sentinel = found["scheme"], found["scheme"].endswith("+sentinel")
    options = _options(found["query"] or "")
    path = unquote(found["path"] or "")
    service, _, database = path.rpartition("/") if "/" in path or not is_sentinel else (path, "", "")
    if scheme == "unix":
        service, database = "", ""
    if bool(found["hosts"]) == (scheme == "unix") or bool(service) != is_sentinel:
        raise ConfigError(f"state: this {scheme}:// URL is not complete: {FORMS[is_sentinel, scheme == 'unix']}")
    username, _, password = (found["login"] or "").partition(":")
    return RedisUrl(
        scheme,
        _hosts(found["hosts"], SENTINEL_PORT if is_sentinel else PORT, is_sentinel),
        f"/{path}" if scheme == "unix" else "",
        service,
        _database(options.pop("db", database)),
        unquote(username),
        unquote(password),
        options,
    )


FORMS = {  # by whether it names Sentinels, a socket
    (False, False): "write redis://user:password@host:6379/0",
    (False, True): "write unix:///path/of/socket?db=0",
    (True, False): "write redis+sentinel://user:password@host:26379,host:26379/service/0",
}


def _hosts(text: str, port: int, many: bool) -> tuple[tuple[str, int], ...]:
    hosts = []
    for part in text.split(",") if text else ():
        found = HOST.fullmatch(part)
        if found is None or int(found["port"] or port) > 65535 or (hosts and not many):
            raise ConfigError(
                "state: the URL's host or port is malformed; a password's special characters are written %XX"
            )
        hosts.append((found["host"].strip("[]"), int(found["port"] or port)))
    return tuple(hosts)


def _database(text: str) -> int:
    if not re.fullmatch(r"\d{0,9}", text):
        raise ConfigError("state: a Redis database is a number, such as 0 in redis://host:6379/0")
    return int(text or 0)


def _options(query: str) -> dict[str, str]:
    options = dict(parse_qsl(query, keep_blank_values=True))
    if unknown := set(options) - set(OPTIONS):
        raise ConfigError(f"state: the URL has an option that isn't among {', '.join(OPTIONS)}: {min(unknown)[:40]!r}")
    return options


def redis_client(url: RedisUrl, connect_seconds: float, reply_seconds: float) -> tuple[Redis, list[Redis]]:
    """The client of the server, which may be found by Sentinels, and the Sentinels' clients. The caller closes all.

    Connects at the first command. No command is repeated: a write that was answered too late may have happened.
    """
    common: dict[str, Any] = {
        "socket_connect_timeout": connect_seconds,
        "socket_timeout": reply_seconds,
        "retry": Retry(NoBackoff(), 0),
        "protocol": 2,
    }
    login = {"username": url.username or None, "password": url.password or None, "db": url.database}
    tls: dict[str, Any] = {name: value for name, value in url.options.items() if name in TLS_OPTIONS}
    if "ssl_check_hostname" in tls:
        tls["ssl_check_hostname"] = tls["ssl_check_hostname"].lower() in ("1", "true", "yes")
    if url.service:
        if url.scheme.startswith("rediss"):
            tls["ssl"] = True
        own = {"username": url.options.get("sentinel_username"), "password": url.options.get("sentinel_password")}
        sentinel = Sentinel(url.hosts, sentinel_kwargs={**common, **own, **tls}, **common, **login, **tls)
        return sentinel.master_for(url.service), sentinel.sentinels
    if url.scheme == "unix":
        pool = ConnectionPool(UnixDomainSocketConnection, path=url.path, **common, **login)
    else:
        host, port = url.hosts[0]
        kinds = {"connection_class": SSLConnection} if url.scheme == "rediss" else {}
        pool = ConnectionPool(**kinds, host=host, port=port, **common, **login, **tls)
    return Redis.from_pool(pool), []
