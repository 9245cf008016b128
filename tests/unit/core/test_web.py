"""Hosts and origins: what is one and the same, and what is allowed."""

from __future__ import annotations

import socket

import pytest

from preft.core.web import AllowedHosts, read_host, read_origin, same_origin

LOOPBACK = ("localhost", "localhost:8000", "LOCALHOST", "localhost.", "127.0.0.1", "127.0.0.1:80", "127.1.2.3:8000",
            "[::1]", "[::1]:8000", "[0:0:0:0:0:0:0:1]:8000", "[::ffff:127.0.0.1]:8000", "localhost:")  # fmt: skip
FOREIGN = (
    "", "evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", "evil-localhost",
    "localhost:8000.evil.example", "localhost@evil.example", "evil.example@localhost", "localhost/evil.example",
    "localhost,evil.example", "localhost evil.example", "10.0.0.1", "0.0.0.0:8000", "::1", "[::1", "[::1].evil",
    "[::2]:8000", "[fe80::1%25eth0]", "*", "http://localhost", "localhost:port", "127.0.0.1:8000:8000", "2130706433",
    "0x7f000001", "127.1", "[localhost]", "localhost\0", "localhost\n",
)  # fmt: skip


@pytest.mark.parametrize("host", LOOPBACK)
def test_loopback_is_always_allowed(host: str) -> None:
    assert host in AllowedHosts(())
    assert host in AllowedHosts(("gpu1.lan",))


@pytest.mark.parametrize("host", FOREIGN)
def test_other_hosts_are_not(host: str) -> None:
    assert host not in AllowedHosts(("127.0.0.1",))


@pytest.mark.parametrize(
    ("given", "host"),
    [
        ("10.0.0.5", "10.0.0.5:8000"),
        ("fd00::5", "[FD00:0::5]:8000"),
        ("[fd00::5]", "[fd00::5]"),
        ("GPU1.lan.", "gpu1.LAN:8000"),
        ("gpu_1", "gpu_1"),
        ("*.example.com", "a.example.com:443"),
        ("*.example.com", "a.b.example.com"),
        ("*", "anything.example"),
        ("*", "10.0.0.1"),
    ],
)
def test_hosts_that_are_given(given: str, host: str) -> None:
    assert host in AllowedHosts((given,))
    assert host not in AllowedHosts(())


@pytest.mark.parametrize("host", ["example.com", "badexample.com", "a.example.com.evil.example", "10.0.0.1"])
def test_names_below_a_domain_are_no_others(host: str) -> None:
    assert host not in AllowedHosts(("*.example.com",))


@pytest.mark.parametrize("bound", ["0.0.0.0", "::"])
def test_a_server_on_all_addresses_is_reached_by_address_and_by_the_machines_name(bound: str) -> None:
    """A page can't take an address for its name: what is resolved anew is a name."""
    hosts = AllowedHosts((bound,))
    assert all(host in hosts for host in ("10.1.2.3:8000", "[fd00::5]:8000", socket.gethostname(), *LOOPBACK))
    assert "evil.example:8000" not in hosts
    assert "10.1.2.3.evil.example" not in hosts


@pytest.mark.parametrize("text", ["", "http://a", "a:80", "a/b", "a b", "-a", "a.*", "*a", "**", "[a]", "a,b"])
def test_what_is_no_host(text: str) -> None:
    with pytest.raises(ValueError, match="is not a host"):
        read_host(text)


@pytest.mark.parametrize(
    "text", ["", "app.example.com", "https://a/", "https://a/b", "https://a?b", "://a", "a b", "**"]
)
def test_what_is_no_origin(text: str) -> None:
    with pytest.raises(ValueError, match="is not an origin"):
        read_origin(text)


def test_one_spelling_per_origin() -> None:
    assert (
        read_origin("HTTPS://App.example.com:443")
        == read_origin("https://app.example.com")
        == "https://app.example.com"
    )
    assert read_origin("http://a:443") == "http://a:443"
    assert [read_origin(text) for text in ("*", "null", "file://", "chrome-extension://abc")] == [
        "*", "null", "file://", "chrome-extension://abc",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("origin", "host", "same"),
    [
        ("http://localhost:8000", "localhost:8000", True),
        ("http://localhost", "localhost:80", True),
        ("https://api.example.com", "api.example.com", True),  # behind a proxy
        ("http://[::1]:8000", "[::1]:8000", True),
        ("http://localhost:3000", "localhost:8000", False),
        ("http://127.0.0.1:8000", "localhost:8000", False),
        ("http://localhost", "localhost:8000", False),
        ("file://", "", False),
        ("null", "null", False),
        ("chrome-extension://localhost:8000", "localhost:8000", False),
    ],
)
def test_pages_of_the_server_itself(origin: str, host: str, same: bool) -> None:
    assert same_origin(origin, host) is same
