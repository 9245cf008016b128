"""Where adapters may come from, and how slowly: what a source named in a request is held against.

Owns the decisions. `sources` asks for each source and file, `remote_files` for each redirect and connection.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from urllib.parse import unquote, urlsplit

from preft.core.errors import InvalidAdapter

NAT64 = ip_network("64:ff9b::/96")  # IPv4 addresses in the last four bytes


@dataclass(frozen=True, slots=True)
class SourceRules:
    """`allowed`: folders, and beginnings of addresses such as `s3://bucket/team`, `https://host` or `hf://`; None: all.

    A beginning with a host allows that host wherever it is. `http://` and `https://` alone allow public addresses, so
    that no request makes the server fetch from inside its network.
    """

    allowed: tuple[str, ...] | None = None

    def check_path(self, path: str) -> None:
        """Raises InvalidAdapter unless `path`, with its links followed, lies in an allowed folder."""
        if self.allowed is None:
            return
        real = os.path.realpath(path)
        folders = (os.path.realpath(folder) for folder in self.allowed if "://" not in folder)
        if not any(_is_in(real, folder) for folder in folders):
            raise not_allowed(path)

    def check_uri(self, uri: str) -> bool:
        """Whether only public addresses may be connected to for `uri`. Raises InvalidAdapter if it isn't allowed."""
        if self.allowed is None:
            return False
        if ".." in unquote(uri).replace("\\", "/").split("/"):
            raise not_allowed(uri)
        place, parts = _web_normal(uri), urlsplit(uri)
        matching = [prefix for prefix in self.allowed if "://" in prefix and _is_in(place, _web_normal(prefix))]
        if not matching:
            raise not_allowed(uri)
        if parts.scheme not in ("http", "https") or any(urlsplit(prefix).netloc for prefix in matching):
            return False
        if not is_public(parts.hostname or "", unless_name=True):
            raise not_allowed(uri)
        return True


@dataclass(frozen=True, slots=True)
class SourceLimits:
    """`timeout`: seconds without a byte after which a source has failed. `min_rate`: bytes per second, on average.

    Both are of remote sources; a fetch that is slower than `min_rate` is given up.
    """

    timeout: float = 30.0
    min_rate: int = 64 << 10
    rules: SourceRules = field(default_factory=SourceRules)


def is_public(host: str, *, unless_name: bool = False) -> bool:
    """Whether the IP address `host` is one of the public internet. What isn't an address is `unless_name`."""
    try:
        address = ip_address(host.partition("%")[0])
    except ValueError:  # a name, unless its last part is a number: 127.1 and 2130706433 are old ways to write addresses
        return unless_name and not host.rstrip(".").rpartition(".")[2][:1].isdigit()
    if isinstance(address, IPv6Address):
        inner = address.ipv4_mapped or (IPv4Address(int(address) & 0xFFFFFFFF) if address in NAT64 else None)
        if inner is None and (address.sixtofour or address.teredo):
            return False
        address = inner or address
    return address.is_global and not address.is_multicast


def _is_in(place: str, folder: str) -> bool:
    """Whether `place` is `folder` or below it. `https://` is the folder of all that begins so."""
    if folder.endswith("://"):
        return place.startswith(folder)
    folder = folder.rstrip("/")
    return place == folder or place.startswith(f"{folder}/")


def _web_normal(uri: str) -> str:
    """A web address with its host in lower case; other addresses as they are."""
    scheme, separator, rest = uri.partition("://")
    if scheme.lower() not in ("http", "https"):
        return uri
    host, slash, path = rest.partition("/")
    return f"{scheme.lower()}{separator}{host.lower()}{slash}{path}"


def not_allowed(source: str) -> InvalidAdapter:
    """What is raised for a source that the rules don't allow."""
    return InvalidAdapter(
        f"adapters may not be read from {source}: upload the adapter, or add the place to the setting adapter_sources",
        param="source",
    )
