"""Which URLs name a Redis, what they mean, and that none of them shows its password."""

from __future__ import annotations

import pytest

from preft.core.errors import ConfigError
from preft.state import local_address
from preft.state.redis_url import parse_redis_url, redis_client

SECRET = "pa:s/w@rd%"
WRITTEN = "pa%3As%2Fw%40rd%25"


@pytest.mark.parametrize(
    ("text", "hosts", "service", "database", "shown"),
    [
        ("redis://host", [("host", 6379)], "", 0, "redis://host:6379/0"),
        ("redis://host:1/3", [("host", 1)], "", 3, "redis://host:1/3"),
        ("redis://host?db=4", [("host", 6379)], "", 4, "redis://host:6379/4"),
        ("rediss://[::1]:7/", [("::1", 7)], "", 0, "rediss://[::1]:7/0"),
        ("unix:///run/redis.sock?db=2", [], "", 2, "unix:///run/redis.sock?db=2"),
        ("redis+sentinel://a/main", [("a", 26379)], "main", 0, "redis+sentinel://a:26379/main/0"),
        (
            "rediss+sentinel://a:1,[::1],c:2/main/5",
            [("a", 1), ("::1", 26379), ("c", 2)],
            "main",
            5,
            "rediss+sentinel://a:1,[::1]:26379,c:2/main/5",
        ),
    ],
)
async def test_urls_are_understood(
    text: str, hosts: list[tuple[str, int]], service: str, database: int, shown: str
) -> None:
    for login, username, password in (
        ("", "", ""),
        (f":{WRITTEN}@", "", SECRET),
        (f"ann:{WRITTEN}@", "ann", SECRET),
        ("ann:a@b/c:#@", "ann", "a@b/c:#"),
    ):
        scheme, _, rest = text.partition("://")
        url = parse_redis_url(f"{scheme}://{login}{rest}")
        assert (list(url.hosts), url.service, url.database, url.shown) == (hosts, service, database, shown)
        assert (url.username, url.password) == (username, password)
        assert not password or password not in repr(url)
        client, sentinels = redis_client(url, 1.0, 2.0)
        own = client.connection_pool.connection_kwargs
        assert (own["password"], own["username"], own["db"]) == (password or None, username or None, database)
        assert len(sentinels) == (len(hosts) if service else 0)
        assert not password or password not in repr(client) + "".join(map(repr, sentinels))


async def test_options_go_where_they_belong() -> None:
    url = parse_redis_url(
        "rediss+sentinel://u:p@a/main?ssl_ca_certs=/ca.pem&ssl_check_hostname=false&sentinel_password=s%26t"
    )
    assert "s&t" not in repr(url)
    client, [sentinel] = redis_client(url, 1.0, 2.0)
    own, theirs = client.connection_pool.connection_kwargs, sentinel.connection_pool.connection_kwargs
    assert (own["password"], theirs["password"]) == ("p", "s&t")
    assert own["ssl_ca_certs"] == theirs["ssl_ca_certs"] == "/ca.pem"
    assert own["ssl_check_hostname"] is theirs["ssl_check_hostname"] is False
    assert url.without_secrets("no p, no s&t") == "no ***, no ***"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("redis://", "not complete: write redis://"),
        ("redis:///0", "not complete"),
        ("redis+sentinel://host", "not complete: write redis\\+sentinel://"),
        ("redis+sentinel://host/", "not complete"),
        ("unix://", "not complete: write unix://"),
        ("unix://host/path", "not complete: write unix://"),
        ("redis://a,b", "host or port is malformed"),
        ("redis://host:99999", "host or port is malformed"),
        ("redis://host:port", "host or port is malformed"),
        ("redis://:hidden?hidden-word@host:1", "may have the options"),
        ("redis://:hidden#word@ho st:6379x", "host or port is malformed"),
        ("redis://host/main", "database is a number"),
        ("redis://host/-1", "database is a number"),
        ("redis://host?timeout=3", "may have the options db, "),
        ("http://host", "starts with redis://, rediss://"),
    ],
)
def test_malformed_urls_are_refused_in_one_sentence(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=f"^state: .*(?:{says})") as caught:
        parse_redis_url(text)
    assert "hidden" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("/srv/state.sqlite", "127.0.0.1"),
        ("sqlite:///srv/state.sqlite", "127.0.0.1"),
        ("unix:///run/redis.sock?db=0", "127.0.0.1"),
        ("redis://:hidden@127.0.0.1:6379/0", "127.0.0.1"),
        ("redis://[::1]:6379/0", "::1"),
        ("redis+sentinel://no.such.host.invalid:1,127.0.0.1:2/service/0", "127.0.0.1"),
    ],
)
def test_the_address_from_which_a_store_is_reached(url: str, address: str) -> None:
    assert local_address(url) == address
