"""Hosts and origins as browsers write them: one spelling for each, and which of them are allowed."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv6Address, ip_address

_PORTS = {"http": "80", "https": "443"}
_NAME = re.compile(r"(?:\*\.)?\w(?:[\w.-]*\w)?")
_AUTHORITY = re.compile(r"(\[[^\[\]]*\]|[^\[\]:@/?#\s,]+)(?::[0-9]*)?")
_ORIGIN = re.compile(r"([a-z][a-z0-9+.-]*)://([^/?#\s]*)")

Address = IPv4Address | IPv6Address


def read_host(text: str) -> str | Address:
    """One spelling per host: addresses parsed, names in lower case, without the root's dot.

    `text` has no port; an IPv6 address may have brackets. Raises ValueError if it can't be a host.
    """
    host = text.lower().removesuffix(".")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    try:
        address = ip_address(bare)
    except ValueError:
        if host != "*" and not _NAME.fullmatch(host):
            raise ValueError(
                f"{text!r} is not a host's name or address; a host is given without scheme and port"
            ) from None
        return host
    return address.ipv4_mapped or address if isinstance(address, IPv6Address) else address


def read_origin(text: str) -> str:
    """One spelling per origin: lower case, without its scheme's usual port. Raises ValueError if it isn't an origin."""
    origin = text.lower()
    if origin in ("*", "null"):
        return origin
    parts = _ORIGIN.fullmatch(origin)
    if parts is None:
        raise ValueError(f"{text!r} is not an origin: it must look like https://app.example.com:8443, without a path")
    scheme, authority = parts.groups()
    return f"{scheme}://{without_usual_port(authority, scheme)}"


def without_usual_port(authority: str, scheme: str) -> str:
    """`host:port` without the port that `scheme` has anyway."""
    return authority.removesuffix(f":{_PORTS[scheme]}") if scheme in _PORTS else authority


class AllowedHosts:
    """The hosts under which clients may reach a server: loopback, the ones it listens on, and further ones.

    A server that listens on all addresses of its machine may be reached under any IP address, which no web page can
    take as its own name, and under the machine's name. `*` allows every host, `*.example.com` the names below
    example.com.
    """

    def __init__(self, hosts: Iterable[str]) -> None:
        self._hosts = {read_host(host) for host in hosts} | {"localhost"}
        self._all = "*" in self._hosts
        self._below = tuple(host[1:] for host in self._hosts if isinstance(host, str) and host.startswith("*."))
        self._any_address = any(not isinstance(host, str) and host.is_unspecified for host in self._hosts)
        if self._any_address:
            self._hosts.add(socket.gethostname().lower())

    def __contains__(self, authority: str) -> bool:
        """Whether `authority`, which is the value of a Host header, has an allowed host. The port doesn't matter."""
        parts = _AUTHORITY.fullmatch(authority)
        try:
            host = read_host(parts[1] if parts else "")
        except ValueError:
            return False
        if self._all or host in self._hosts:
            return True
        if isinstance(host, str):
            return host.endswith(self._below) if self._below else False
        return host.is_loopback or self._any_address


def same_origin(origin: str, authority: str) -> bool:
    """Whether a page of `origin` is from the server that was asked as `authority`, also through a proxy with TLS."""
    scheme, _, host = origin.partition("://")
    return scheme in _PORTS and host != "" and host == without_usual_port(authority.lower(), scheme)
