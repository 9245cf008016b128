"""Nobody makes the server fetch from inside its network, read its files, or wait for a source without end."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from preft.adapters.formats.digest import CONFIG_FILE, WEIGHTS_FILE
from preft.adapters.sources.limits import SourceLimits, SourceRules, is_public
from preft.adapters.sources.source import AdapterSource, open_source
from preft.core.errors import InvalidAdapter, Unavailable
from support.faulty_http import FaultyServer, serve_folder

REFUSED = "may not be read from .*: upload the adapter, or add the place to the setting adapter_sources"


def write(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / CONFIG_FILE).write_text("{}")
    (folder / WEIGHTS_FILE).write_bytes(b"weights" * 1000)
    return folder


def limited(*allowed: str) -> SourceLimits:
    return SourceLimits(5.0, rules=SourceRules(allowed))


def whole(source: AdapterSource) -> bytes:
    return b"".join(chunk for name in source.files() for chunk in source.read(name))


# Folders


def test_a_folder_outside_is_refused_however_it_is_named(tmp_path: Path) -> None:
    inside, outside = write(tmp_path / "adapters" / "ada"), write(tmp_path / "adapters-of-others" / "bob")
    (tmp_path / "adapters" / "link").symlink_to(outside)
    (tmp_path / "adapters" / "up").symlink_to(tmp_path / "adapters-of-others")
    limits = limited(str(tmp_path / "adapters"))
    assert whole(open_source(str(inside), limits)) == whole(open_source(str(inside)))
    assert open_source(f"file://{inside}", limits).files()
    for place in (
        str(outside),
        f"file://{outside}",
        f"{inside}/../../adapters-of-others/bob",
        f"file://{tmp_path}/adapters/%2e%2e/adapters-of-others/bob",
        str(tmp_path / "adapters" / "link"),
        str(tmp_path / "adapters" / "up" / "bob"),
        str(tmp_path),
        "/etc",
    ):
        with pytest.raises(InvalidAdapter, match=REFUSED) as raised:
            open_source(place, limits)
        assert raised.value.param == "source"


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
def test_a_file_that_is_a_link_to_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    folder, secret = write(tmp_path / "adapters" / "ada"), tmp_path / "secret"
    secret.write_text("{}")
    source = open_source(str(folder), limited(str(tmp_path / "adapters")))
    (folder / name).unlink()
    (folder / name).symlink_to(secret)
    for ask in (source.files, source.stamp, lambda: list(source.read(name))):
        with pytest.raises(InvalidAdapter, match=REFUSED):
            ask()


def test_links_within_what_is_allowed_are_followed(tmp_path: Path) -> None:
    """As in the cache of the Hugging Face hub."""
    folder, blobs = write(tmp_path / "adapters" / "ada"), tmp_path / "adapters" / "blobs"
    (folder / WEIGHTS_FILE).rename(blobs)
    (folder / WEIGHTS_FILE).symlink_to(blobs)
    (tmp_path / "known-as").symlink_to(tmp_path / "adapters")
    assert whole(open_source(str(folder), limited(str(tmp_path / "known-as")))) == b"{}" + b"weights" * 1000


# Addresses


@pytest.mark.parametrize(
    ("allowed", "uri", "fine"),
    [
        ("s3://bucket/team", "s3://bucket/team/ada", True),
        ("s3://bucket/team", "s3://bucket/team-of-others/ada", False),
        ("s3://bucket/team", "s3://bucket/team/../other", False),
        ("s3://bucket", "s3://bucket-of-others/ada", False),
        ("s3://", "s3://bucket/ada", True),
        ("s3://", "hf://user/repository", False),
        ("https://host", "https://host/ada", True),
        ("https://host", "HTTPS://HOST/ada", True),
        ("https://Host/", "https://host/ada", True),
        ("https://host/ada/", "https://host/ada", True),
        ("https://host", "http://host/ada", False),
        ("https://host", "https://host.evil.example/ada", False),
        ("https://host", "https://host:8443/ada", False),
        ("https://host/team", "https://host/team/%2e%2e/other", False),
        ("https://host/team", "https://host/team/..%5cother", False),
        ("https://", "https://10.0.0.1/ada", False),
        ("https://", "https://[::1]/ada", False),
        ("https://10.0.0.1", "https://10.0.0.1/ada", True),
        ("/", "https://host/ada", False),
    ],
)
def test_what_an_address_must_begin_with(allowed: str, uri: str, fine: bool) -> None:
    rules = SourceRules((allowed,))
    if fine:
        rules.check_uri(uri)
        return
    with pytest.raises(InvalidAdapter, match=REFUSED):
        rules.check_uri(uri)


@pytest.mark.parametrize(
    ("host", "public"),
    [
        *[(host, False) for host in ("127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254")],
        *[(host, False) for host in ("0.0.0.0", "100.64.0.1", "224.0.0.1", "255.255.255.255", "2130706433", "127.1")],
        *[(host, False) for host in ("::1", "::", "fe80::1%eth0", "fd00::1", "ff02::1", "::ffff:10.0.0.1")],
        *[(host, False) for host in ("64:ff9b::7f00:1", "2002:7f00:1::", "localhost", "")],
        *[(host, True) for host in ("1.1.1.1", "2606:4700::1111", "::ffff:1.1.1.1", "64:ff9b::101:101")],
    ],
)
def test_public_addresses(host: str, public: bool) -> None:
    assert is_public(host) is public


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FaultyServer]:
    write(tmp_path / "served" / "ada")
    with serve_folder(tmp_path / "served") as server:
        yield server


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "2130706433", "127.1", "0x7f000001", "[::ffff:127.0.0.1]"])
def test_a_scheme_alone_allows_no_server_inside(server: FaultyServer, host: str) -> None:
    """Names are judged by the address that is connected to, so that a name server can't change it in between."""
    url = server.url.replace("127.0.0.1", host)
    with pytest.raises(InvalidAdapter, match=REFUSED):
        whole(open_source(f"{url}/ada", limited("http://")))
    assert server.requests == []


def test_a_named_server_inside_is_allowed(server: FaultyServer) -> None:
    for url in (server.url, server.url.replace("127.0.0.1", "localhost")):
        assert whole(open_source(f"{url}/ada", limited(url, "http://"))) == b"{}" + b"weights" * 1000


@pytest.mark.parametrize("others", [(), ("http://",), ("/",)])
def test_a_redirect_leads_nowhere_else(server: FaultyServer, tmp_path: Path, others: tuple[str, ...]) -> None:
    write(tmp_path / "inside" / "ada")
    with serve_folder(tmp_path / "inside") as inside:
        server.faults.redirect = inside.url
        limits = limited(server.url, *others)
        for ask in (
            lambda: open_source(f"{server.url}/ada", limits).files(),
            lambda: list(open_source(f"{server.url}/ada", limits).read(WEIGHTS_FILE)),
        ):
            with pytest.raises(InvalidAdapter, match=REFUSED):
                ask()
        assert inside.requests == []
        assert whole(open_source(f"{server.url}/ada", limited(server.url, inside.url)))


def test_a_redirect_to_a_file_is_not_followed(server: FaultyServer) -> None:
    server.faults.redirect = "file:///etc"
    with pytest.raises(Unavailable, match="can't be read"):
        open_source(f"{server.url}/ada", limited(server.url)).files()


# Slowness


def test_a_source_that_dribbles_is_given_up(server: FaultyServer) -> None:
    """It is never silent for long, and would take hours."""
    server.faults.dribble = 0.01
    started = time.monotonic()
    with pytest.raises(Unavailable, match="less than 10000000 bytes per second came"):
        list(open_source(f"{server.url}/ada", SourceLimits(0.3, 10_000_000)).read(WEIGHTS_FILE))
    assert time.monotonic() - started < 5


def test_a_slow_source_that_is_fast_enough_is_read(server: FaultyServer) -> None:
    server.faults.dribble = 0.0
    stop = threading.Event()
    source = open_source(f"{server.url}/ada", SourceLimits(5.0, 100), stop=stop)
    assert whole(source) == b"{}" + b"weights" * 1000


def test_errors_tell_no_addresses(server: FaultyServer, tmp_path: Path) -> None:
    with serve_folder(tmp_path) as gone:
        url = gone.url.replace("127.0.0.1", "localhost")
    with pytest.raises(Unavailable) as raised:
        open_source(f"{url}/ada").files()
    assert str(raised.value) == f"{url}/ada can't be read: the connection failed"
