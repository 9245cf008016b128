"""The client's settings, checked once: addresses, key, time limits, TLS."""

from __future__ import annotations

import math
import os
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from preft_client.errors import ConfigError

DEFAULT_URL = "http://127.0.0.1:8000"
URL_VARIABLE, KEY_VARIABLE = "PREFT_URL", "PREFT_API_KEY"
SCHEMES = ("http", "https", "grpc", "grpcs")


@dataclass(frozen=True, slots=True)
class TLS:
    """PEM files. `ca` holds the authorities to trust (None: the usual ones); `cert` and `key` are the client's own."""

    ca: str | Path | None = None
    cert: str | Path | None = None
    key: str | Path | None = None

    def content(self) -> tuple[bytes | None, bytes | None, bytes | None]:
        """The bytes of `ca`, `cert` and `key`. Raises ConfigError."""
        if (self.cert is None) != (self.key is None):
            raise ConfigError("tls: a client certificate needs both cert and key")
        return _read(self.ca, "ca"), _read(self.cert, "cert"), _read(self.key, "key")

    def context(self) -> ssl.SSLContext:
        """For HTTPS. Raises ConfigError."""
        self.content()
        try:
            context = ssl.create_default_context(cafile=self.ca)
            if self.cert is not None:
                context.load_cert_chain(self.cert, self.key)
        except (OSError, ValueError) as error:
            raise ConfigError(f"tls: the certificates can't be used: {error}") from error
        return context


@dataclass(frozen=True, slots=True)
class Settings:
    """`urls` are gateways of one cluster and have one transport. Times are in seconds."""

    urls: tuple[str, ...]
    api_key: str | None
    timeout: float
    connect_timeout: float
    retries: int
    tls: TLS | None

    @classmethod
    def of(
        cls,
        url: str | Sequence[str] | None,
        api_key: str | None,
        timeout: float,
        connect_timeout: float,
        retries: int,
        tls: TLS | None,
    ) -> Settings:
        """Checks all values; absent ones come from the environment. Raises ConfigError."""
        if url is None:
            url = os.environ.get(URL_VARIABLE) or DEFAULT_URL
        urls = tuple(map(_checked_url, (url,) if isinstance(url, str) else url))
        if not urls:
            raise ConfigError("url: at least one address is needed")
        if len({is_rpc(one) for one in urls}) > 1:
            raise ConfigError("url: all addresses must be of one transport, HTTP or gRPC")
        if tls is not None and not all(one.startswith(("https", "grpcs")) for one in urls):
            raise ConfigError("tls: the address must start with https:// or grpcs://")
        key = os.environ.get(KEY_VARIABLE) or None if api_key is None else api_key
        if key is not None and not (key.isascii() and key.isprintable() and key and " " not in key):
            raise ConfigError("api_key: a key has visible ASCII characters alone")
        if retries < 0:
            raise ConfigError("retries: must not be negative")
        return cls(urls, key, checked_seconds(timeout, "timeout"), checked_seconds(connect_timeout, "connect_timeout"),
                   retries, tls)  # fmt: skip

    @property
    def rpc(self) -> bool:
        return is_rpc(self.urls[0])

    def authorization(self) -> dict[str, str]:
        """The header, or gRPC metadata, that shows the key."""
        return {"authorization": f"Bearer {self.api_key}"} if self.api_key else {}


def checked_seconds(seconds: float, name: str) -> float:
    """Raises ConfigError unless `seconds` is a positive, finite number."""
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 < seconds < math.inf:
        raise ConfigError(f"{name}: must be a positive number of seconds, not {seconds!r}")
    return float(seconds)


def is_rpc(url: str) -> bool:
    return url.startswith("grpc")


def _checked_url(url: str) -> str:
    try:
        parts = urlsplit(url)
        good = parts.scheme in SCHEMES and bool(parts.hostname) and not (parts.query or parts.fragment)
        good = good and parts.username is None and (parts.port is not None or not is_rpc(url))
    except (ValueError, AttributeError, TypeError):
        good = False
    if not good or (is_rpc(url) and parts.path.strip("/")):
        raise ConfigError(
            f"url: {url!r} is not an address: it must look like http://host:8000, https://host, or grpc://host:9000"
        )
    return url.rstrip("/")


def _read(path: str | Path | None, name: str) -> bytes | None:
    if path is None:
        return None
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"tls.{name}: {path} can't be read: {error.strerror}") from error
