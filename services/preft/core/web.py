"""Hosts and origins as browsers write them: one spelling for each, and the rule for allowed hosts."""

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
    """One spelling per host: addresses parsed, names in lower case, without the final dot.

    `text` has no port; an IPv6 address may have brackets. Raises ValueError for an invalid host.
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
    """One spelling per origin: lower case, without the scheme's default port. Raises ValueError for a wrong origin."""
    origin = text.lower()
    if origin in ("*", "null"):
        return origin
    parts = _ORIGIN.fullmatch(origin)
    if parts is None:
        raise ValueError(f"{text!r} is not an origin: it must look like https://app.example.com:8443, without a path")
    scheme, authority = parts.groups()
    return f"{scheme}://{without_usual_port(authority, scheme)}"


def without_usual_port(authority: str, scheme: str) -> str:
    """`authority` (`host:port`) without the default port of `scheme`."""
    return authority.removesuffix(f":{_PORTS[scheme]}") if scheme in _PORTS else authority


def is_unspecified(host: str) -> bool:
    """Whether `host` stands for all addresses of the machine that listens: 0.0.0.0, :: or another spelling of them."""
    try:
        return read_host(host) in (IPv4Address(0), IPv6Address(0)) or socket.inet_aton(host) == bytes(4)
    except (OSError, ValueError):
        return False


def reachable(host: str) -> str:
    """The address under which this machine reaches a server that listens on `host`."""
    if not is_unspecified(host):
        return host
    return "::1" if ":" in host else "127.0.0.1"


class AllowedHosts:
    """The hosts under which clients may reach a server: loopback, the host it listens on, and further hosts.

    A server that listens on all addresses also allows the machine's name and every IP address: no web page can have an
    IP address as its own name. `*` allows every host, `*.example.com` every name below example.com.
    """

    def __init__(self, hosts: Iterable[str]) -> None:
        self._hosts = {read_host(host) for host in hosts} | {"localhost"}
        self._all = "*" in self._hosts
        self._below = tuple(host[1:] for host in self._hosts if isinstance(host, str) and host.startswith("*."))
        self._any_address = any(not isinstance(host, str) and host.is_unspecified for host in self._hosts)
        if self._any_address:
            self._hosts.add(socket.gethostname().lower())

    def __contains__(self, authority: str) -> bool:
        """Whether the host in `authority`, the value of a Host header, is allowed. The port doesn't matter."""
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
    """Whether a page of `origin` comes from the server that Host `authority` names, also through a proxy with TLS."""
    scheme, _, host = origin.partition("://")
    return scheme in _PORTS and host != "" and host == without_usual_port(authority.lower(), scheme)
