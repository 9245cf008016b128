"""Rules for adapter sources: where adapters may come from, and how slow a source may be.

The module owns the decisions. `source` applies them to each source and file, `remote_files` to each redirect and
connection.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from urllib.parse import unquote, urlsplit

from preft.core.errors import InvalidAdapter

NAT64 = ip_network("64:ff9b::/96")  # the last four bytes are an IPv4 address


@dataclass(frozen=True, slots=True)
class SourceRules:
    """`allowed` holds folders, and URI prefixes such as `s3://bucket/team`, `https://host` or `hf://`. None allows all.

    A prefix with a host allows this host at any address. `http://` and `https://` without a host allow only public
    addresses, so that no request makes the server fetch from inside its network.
    """

    allowed: tuple[str, ...] | None = None

    def check_path(self, path: str) -> None:
        """Raises InvalidAdapter unless `path`, with symbolic links resolved, lies in an allowed folder."""
        if self.allowed is None:
            return
        real = os.path.realpath(path)
        folders = (os.path.realpath(folder) for folder in self.allowed if "://" not in folder)
        if not any(_is_in(real, folder) for folder in folders):
            raise rule_error(path)

    def check_uri(self, uri: str) -> bool:
        """Whether `uri` may connect to public addresses only. Raises InvalidAdapter if `uri` isn't allowed."""
        if self.allowed is None:
            return False
        if ".." in unquote(uri).replace("\\", "/").split("/"):
            raise rule_error(uri)
        place, parts = _web_normal(uri), urlsplit(uri)
        matching = [prefix for prefix in self.allowed if "://" in prefix and _is_in(place, _web_normal(prefix))]
        if not matching:
            raise rule_error(uri)
        if parts.scheme not in ("http", "https") or any(urlsplit(prefix).netloc for prefix in matching):
            return False
        if not is_public(parts.hostname or "", unless_name=True):
            raise rule_error(uri)
        return True


@dataclass(frozen=True, slots=True)
class SourceLimits:
    """Limits of remote sources. `timeout`: seconds without a byte after which a source fails.

    `min_rate`: average bytes per second below which a fetch fails.
    """

    timeout: float = 30.0
    min_rate: int = 64 << 10
    rules: SourceRules = field(default_factory=SourceRules)


def is_public(host: str, *, unless_name: bool = False) -> bool:
    """Whether the IP address `host` is public. Returns `unless_name` for a host name."""
    try:
        address = ip_address(host.partition("%")[0])
    except ValueError:  # a name, unless its last part is a number: 127.1 and 2130706433 are old forms of addresses
        return unless_name and not host.rstrip(".").rpartition(".")[2][:1].isdigit()
    if isinstance(address, IPv6Address):
        inner = address.ipv4_mapped or (IPv4Address(int(address) & 0xFFFFFFFF) if address in NAT64 else None)
        if inner is None and (address.sixtofour or address.teredo):
            return False
        address = inner or address
    return address.is_global and not address.is_multicast


def _is_in(place: str, folder: str) -> bool:
    """Whether `place` is `folder` or below it. A scheme such as `https://` contains all its URIs."""
    if folder.endswith("://"):
        return place.startswith(folder)
    folder = folder.rstrip("/")
    return place == folder or place.startswith(f"{folder}/")


def _web_normal(uri: str) -> str:
    """A web address with its host in lower case; other addresses unchanged."""
    scheme, separator, rest = uri.partition("://")
    if scheme.lower() not in ("http", "https"):
        return uri
    host, slash, path = rest.partition("/")
    return f"{scheme.lower()}{separator}{host.lower()}{slash}{path}"


def rule_error(source: str) -> InvalidAdapter:
    """The error for a source that the rules don't allow."""
    return InvalidAdapter(
        f"adapters may not be read from {source}: upload the adapter, or add the place to the setting adapter_sources",
        param="source",
    )
