"""What only the Redis store can get wrong: faults of the server, lost data, logins, Sentinels. The servers are real."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from preft.core.cluster import Adapter, Role, Worker
from preft.core.errors import ConfigError, PreftError, Unavailable
from preft.state import open_store
from preft.state.redis_store import RedisStore
from support.certificates import Authority, write_certificate
from support.redis_server import PROGRAM, RedisServer, free_port, running_redis

WORKER = Worker("w", Role.PREFILL, "127.0.0.1:4000", "f", 1)
ADAPTER = Adapter("ada", "d" * 64, "/s", 8, created=5.5)
PASSWORD = "hidden-word"


@pytest.fixture
async def store(redis_server: RedisServer) -> AsyncIterator[RedisStore]:
    store = RedisStore(redis_server.url(), "test")
    yield store
    await store.close()


def calls(store: RedisStore) -> list[Callable[[], Awaitable[object]]]:
    return [
        lambda: store.put_worker(WORKER, 60),
        lambda: store.remove_worker("w"),
        store.workers,
        lambda: store.put_adapter(ADAPTER, expect=None),
        lambda: store.delete_adapter("ada"),
        lambda: store.adapter("ada"),
        lambda: store.adapter_changes(0),
    ]


async def until_it_works(call: Callable[[], Awaitable[object]], seconds: float = 10.0) -> float:
    """The seconds until `call` raised no Unavailable any more."""
    started = time.monotonic()
    while True:
        try:
            await call()
        except Unavailable:
            if time.monotonic() - started > seconds:
                raise
            await asyncio.sleep(0.02)
        else:
            return time.monotonic() - started


# Faults of the server


async def test_a_killed_server_is_used_again_with_its_data(store: RedisStore, redis_server: RedisServer) -> None:
    await store.put_worker(WORKER, 600)
    await store.put_adapter(ADAPTER, expect=None)
    before = await store.adapter_changes(0)
    redis_server.kill()
    await asyncio.sleep(0.05)  # for the event loop to notice
    for call in calls(store):
        started = time.monotonic()
        with pytest.raises(
            Unavailable, match=r"^the state store redis://127.0.0.1:\d+/0 can't be used: Error 111 connecting to 127"
        ):
            await call()
        assert time.monotonic() - started < 1
    redis_server.start()
    await until_it_works(store.workers)
    assert await store.workers() == [WORKER]
    assert await store.adapter_changes(0) == before
    assert not (await store.adapter_changes(before.revision)).is_whole


async def test_a_frozen_server_fails_calls_in_time(store: RedisStore, redis_server: RedisServer) -> None:
    """With an open connection, and where a new one would be needed."""
    await store.workers()
    fresh = RedisStore(redis_server.url(), "test")
    with redis_server.frozen():
        started = time.monotonic()
        failing = [call() for one in (store, fresh) for call in calls(one)]
        errors = await asyncio.gather(*failing, return_exceptions=True)
        assert time.monotonic() - started < 3.5
        assert {str(error) for error in errors} == {
            f"the state store redis://127.0.0.1:{redis_server.port}/0 doesn't answer within 2 s"
        }
        await asyncio.sleep(max(0, started + 3 - time.monotonic()))
    assert await until_it_works(store.workers) < 2
    assert await until_it_works(fresh.workers) < 2
    await fresh.close()


async def test_closing_does_not_wait_for_a_frozen_server(redis_server: RedisServer) -> None:
    store = RedisStore(redis_server.url(), "test")
    await store.wait_changed(5)
    await store.workers()
    with redis_server.frozen():
        started = time.monotonic()
        await store.close()
        assert time.monotonic() - started < 1


async def test_changes_are_told_again_after_a_restart(store: RedisStore, redis_server: RedisServer) -> None:
    other = RedisStore(redis_server.url(), "test")
    await store.wait_changed(5)
    redis_server.kill()
    started = time.monotonic()
    await store.wait_changed(0.5)
    assert 0.4 < time.monotonic() - started < 1
    redis_server.start()
    await store.wait_changed(10)  # the new subscription: something may have changed meanwhile
    waiting = asyncio.create_task(store.wait_changed(20))
    await asyncio.sleep(0.1)
    assert not waiting.done()
    started = time.monotonic()
    await until_it_works(lambda: other.put_adapter(ADAPTER, expect=None))
    await waiting
    assert time.monotonic() - started < 1
    await other.close()


async def test_a_renewal_is_no_news(store: RedisStore, redis_server: RedisServer) -> None:
    """Or thousands of workers would wake thousands of readers all the time."""
    await store.put_worker(WORKER, 60)
    await store.wait_changed(5)
    await store.put_worker(WORKER, 60)
    started = time.monotonic()
    await store.wait_changed(0.3)
    assert time.monotonic() - started > 0.29


# Lost data


@pytest.mark.parametrize("how", ["emptied", "restarted"])
async def test_a_lost_catalog_is_another_epoch(store: RedisStore, redis_server: RedisServer, how: str) -> None:
    await store.put_adapter(ADAPTER, expect=None)
    await store.put_worker(WORKER, 60)
    before = await store.adapter_changes(0)
    if how == "emptied":
        redis_server.empty()
    else:
        redis_server.restart(with_data=False)
        await asyncio.sleep(0.05)
    for since in (before.revision, 0):
        after = await store.adapter_changes(since)
        assert (after.put, after.is_whole, after.revision) == ((), True, 0)
        assert after.epoch != before.epoch
    assert await store.workers() == []
    await store.put_worker(WORKER, 60)  # its next renewal
    assert await store.workers() == [WORKER]
    await store.put_adapter(replace(ADAPTER, name="bob"), expect=None)
    again = await store.adapter_changes(before.revision)
    assert ([adapter.name for adapter in again.put], again.is_whole) == (["bob"], True)
    assert again.epoch not in (before.epoch, "")
    assert (await store.adapter_changes(again.revision)).epoch == again.epoch


async def test_an_old_copy_of_the_catalog_is_another_epoch(redis_server: RedisServer) -> None:
    """As after a restart from an old snapshot, or when a replica takes over that lacks the latest changes: although
    there are as many changes again, or more."""
    store = RedisStore(redis_server.url(), "test")
    names = [f"a{number}" for number in range(8)]
    for name in names[:3]:
        await store.put_adapter(replace(ADAPTER, name=name), expect=None)
    seen = await store.adapter_changes(0)
    copies = {key: dump(redis_server, f"preft:{{test}}:{key}") for key in ("catalog", "adapters", "changed", "history")}
    for name in names[3:6]:
        await store.put_adapter(replace(ADAPTER, name=name), expect=None)
    lost = await store.adapter_changes(0)
    for more in range(5):
        redis_server.empty()
        for key, copy in copies.items():
            restore(redis_server, f"preft:{{test}}:{key}", copy)
        for number in range(more):
            await store.put_adapter(replace(ADAPTER, name=f"new-{number}"), expect=None)
        whole = await store.adapter_changes(lost.revision)
        assert whole.is_whole
        assert whole.epoch != lost.epoch
        assert [adapter.name for adapter in whole.put] == [*names[:3], *(f"new-{number}" for number in range(more))]
        behind = await store.adapter_changes(seen.revision)  # this reader saw nothing of what was lost
        assert (len(behind.put), behind.is_whole) == (more, False)
    await store.close()


def dump(server: RedisServer, key: str) -> bytes:
    found = subprocess.run(["redis-cli", "-p", str(server.port), "dump", key], capture_output=True, check=True)
    return found.stdout.removesuffix(b"\n")


def restore(server: RedisServer, key: str, value: bytes) -> None:
    words = ["redis-cli", "-p", str(server.port), "-x", "restore", key, "0"]
    assert subprocess.run(words, input=value, capture_output=True, check=True).stdout == b"OK\n"


async def test_an_incomplete_catalog_is_an_error(store: RedisStore, redis_server: RedisServer) -> None:
    """Not a catalog without adapters: readers keep what they know."""
    await store.put_adapter(ADAPTER, expect=None)
    redis_server.command("DEL", "preft:{test}:adapters")
    with pytest.raises(Unavailable, match=r"keys of the adapter catalog are not complete"):
        await store.adapter_changes(0)


# Keys


async def test_all_keys_are_the_clusters_and_few(store: RedisStore, redis_server: RedisServer) -> None:
    """With one hash tag, for one slot of a Redis Cluster. An expired worker leaves nothing."""
    await store.put_adapter(ADAPTER, expect=None)
    await store.delete_adapter("ada")
    await store.put_worker(WORKER, 0.05)
    await asyncio.sleep(0.1)
    assert await store.workers() == []
    found = redis_server.command("KEYS", "*").split()
    keys = [word for word in found if word.startswith("preft")]
    assert sorted(keys) == [f"preft:{{test}}:{key}" for key in ("catalog", "history", "removed")]


@pytest.mark.parametrize("cluster", ["", "a b", "a}", "x" * 65])
def test_a_cluster_has_a_plain_name(cluster: str) -> None:
    with pytest.raises(ConfigError, match="can't name a cluster"):
        open_store("redis://127.0.0.1:1", cluster)


# Logins


async def test_a_wrong_login_is_said_without_the_password(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with running_redis(tmp_path, password="right-word") as server:
        right = RedisStore(server.url(), "test")
        assert await right.workers() == []
        await right.close()
        for login in ("", f":{PASSWORD}@", f"ann:{PASSWORD}@"):
            url = server.url().replace(":right-word@", login)
            store = RedisStore(url, "test")
            waiting = asyncio.create_task(store.wait_changed(0.5))
            for call in calls(store):
                with pytest.raises(Unavailable, match="refuses the login: check user and password") as caught:
                    await call()
                assert PASSWORD not in repr(caught.value)
            await waiting
            await store.close()
    assert PASSWORD not in caplog.text


async def test_the_rights_of_the_documentation_suffice(tmp_path: Path) -> None:
    rights = ["~preft:*", "&preft:*", "-@all", "+@read", "+@write", "+@connection", "+@scripting", "+@pubsub"]
    with running_redis(tmp_path) as server:
        assert server.command("ACL", "SETUSER", "ann", "on", ">word", *rights).startswith("+OK")
        store = RedisStore(server.url("ann:word@"), "test")
        await store.wait_changed(0.5)
        for call in calls(store):
            await call()
        await store.put_adapter(ADAPTER, expect=None)
        await store.wait_changed(5)
        assert (await store.adapter_changes(0)).put == (ADAPTER,)
        await store.close()


async def test_an_unreachable_server_is_said_without_the_password(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    for place in (f"127.0.0.1:{free_port()}", "no-such-host.invalid:6379"):
        store = RedisStore(f"redis://ann:{PASSWORD}@{place}/0", "test")
        with pytest.raises(PreftError, match=f"^the state store redis://{place}/0 ") as caught:
            await store.workers()
        assert PASSWORD not in repr(caught.value)
        assert "\n" not in str(caught.value)
        await store.close()
    assert PASSWORD not in caplog.text


# Other ways to a server


async def test_a_socket_of_the_machine(tmp_path: Path) -> None:
    path = tmp_path / "redis.sock"
    with running_redis(tmp_path / "data", "--unixsocket", str(path)):
        store = open_store(f"unix://{path}?db=1", "test")
        await store.put_worker(WORKER, 60)
        await store.wait_changed(5)
        assert await store.workers() == [WORKER]
        await store.close()


async def test_an_encrypted_connection(tmp_path: Path) -> None:
    certificate, key = write_certificate(tmp_path)
    port = free_port()
    tls = ["--tls-port", str(port), "--tls-cert-file", str(certificate), "--tls-key-file", str(key)]
    with running_redis(tmp_path / "data", *tls, "--tls-auth-clients", "no", password=PASSWORD):
        url = f"rediss://:{PASSWORD}@127.0.0.1:{port}/0"
        store = open_store(f"{url}?ssl_ca_certs={certificate}", "test")
        await store.put_worker(WORKER, 60)
        await store.wait_changed(5)
        assert await store.workers() == [WORKER]
        await store.close()
        unknown = open_store(url, "test")  # nobody vouches for the certificate
        with pytest.raises(Unavailable, match="certificate") as caught:
            await unknown.workers()
        assert "\n" not in str(caught.value)
        await unknown.close()


async def test_sentinels_name_the_next_server(tmp_path: Path) -> None:
    """Two servers and a Sentinel: after the first server's death, the store uses the second."""
    login = ("--masterauth", PASSWORD)
    with running_redis(tmp_path / "one", *login, password=PASSWORD) as one:
        replica = ("--replicaof", f"127.0.0.1 {one.port}")
        with (
            running_redis(tmp_path / "two", *login, *replica, password=PASSWORD) as two,
            sentinel(tmp_path, one) as port,
        ):
            dead = free_port()
            url = f"redis+sentinel://:{PASSWORD}@127.0.0.1:{dead},127.0.0.1:{port}/main/0"
            store = open_store(url, "test")
            assert await store.put_adapter(ADAPTER, expect=None)
            await store.wait_changed(5)
            while two.command("EXISTS", "preft:{test}:adapters") != ":1\r\n":
                await asyncio.sleep(0.02)
            one.kill()
            with pytest.raises(Unavailable) as caught:
                await store.adapter("ada")
            assert PASSWORD not in str(caught.value)
            seconds = await until_it_works(lambda: store.put_adapter(replace(ADAPTER, name="bob"), expect=None), 30)
            assert [adapter.name for adapter in (await store.adapter_changes(0)).put] == ["ada", "bob"]
            print(f"\nthe next server was used after {seconds:.1f} s")
            await store.close()
            unknown = open_store(url.replace("/main/", "/other/"), "test")
            with pytest.raises(Unavailable, match="no Sentinel names a server of the service 'other'"):
                await unknown.workers()
            await unknown.close()


@contextmanager
def sentinel(folder: Path, server: RedisServer) -> Iterator[int]:
    """A Sentinel that watches `server`, and needs half a second to notice its death. Gives its port."""
    port = free_port()
    config = folder / "sentinel.conf"  # which Sentinel rewrites
    config.write_text(
        f"port {port}\nbind 127.0.0.1\ndir {folder}\nlogfile sentinel.log\n"
        f"sentinel monitor main 127.0.0.1 {server.port} 1\nsentinel auth-pass main {PASSWORD}\n"
        "sentinel down-after-milliseconds main 500\nsentinel failover-timeout main 5000\n"
    )
    process = subprocess.Popen([PROGRAM, str(config), "--sentinel"])
    try:
        give_up = time.monotonic() + 20
        while "flags" not in _sentinel_replicas(port):
            assert time.monotonic() < give_up
            time.sleep(0.1)
        yield port
    finally:
        process.terminate()
        process.wait(20)


def _sentinel_replicas(port: int) -> str:
    words = ["redis-cli", "-p", str(port), "sentinel", "replicas", "main"]
    return subprocess.run(words, capture_output=True, check=False).stdout.decode()


async def test_a_server_that_asks_for_a_certificate(tmp_path: Path) -> None:
    certificate, key = write_certificate(tmp_path)
    own, port = Authority().issue(tmp_path / "own"), free_port()
    tls = ["--tls-port", str(port), "--tls-cert-file", str(certificate), "--tls-key-file", str(key)]
    with running_redis(tmp_path / "data", *tls, "--tls-ca-cert-file", own["ca"], password=PASSWORD):
        url = f"rediss://:{PASSWORD}@127.0.0.1:{port}/0?ssl_ca_certs={certificate}"
        store = open_store(f"{url}&ssl_certfile={own['cert']}&ssl_keyfile={own['key']}", "test")
        await store.put_worker(WORKER, 60)
        await store.wait_changed(5)
        assert await store.workers() == [WORKER]
        await store.close()
        stranger = open_store(url, "test")
        with pytest.raises(Unavailable):
            await stranger.workers()
        await stranger.close()
