"""What every state store promises. A new store joins by one more entry in STORES."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from preft.core.cluster import Adapter, Role, Worker
from preft.core.errors import ConfigError, PreftError, Unavailable
from preft.core.ports import AdapterChanges, StateStore
from preft.state import open_store, redis_store, sqlite
from support.redis_server import RedisServer

STORES: dict[str, Callable[[Path, RedisServer], str]] = {
    "sqlite": lambda folder, redis: f"sqlite://{folder}/state/cluster.sqlite",
    "redis": lambda folder, redis: redis.url(),
}
LONG = 3600.0  # seconds of a registration

SERVICES = Path(__file__).parents[2] / "services"

# Each writer registers its own workers and moves one shared adapter along, version by version.
WRITER = """
import asyncio, sys
from dataclasses import replace
from preft.core.cluster import Adapter, Role, Worker
from preft.state import open_store

async def main(url, name, steps):
    store = open_store(url)
    won = 0
    for step in range(steps):
        worker = Worker(f"{name}-{step % 5}", Role.DECODE, "h:1", "f", 1, kv_blocks=step)
        await store.put_worker(worker, 3600)
        held = await store.adapter("shared")
        adapter = Adapter("shared", str(int(held.digest) + 1 if held else 1), "/s", 8)
        won += await store.put_adapter(adapter, expect=held)
        print("step", flush=True)
    await store.close()
    print("won", won, flush=True)

asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
"""


def a_worker(worker_id: str = "decode-0", **changes: object) -> Worker:
    values: dict[str, object] = {
        "id": worker_id,
        "role": Role.DECODE,
        "address": "127.0.0.1:5000",
        "fingerprint": "llama/f32",
        "pid": 12,
        "engine_pids": (13, 14),
        "kv_blocks": 100,
        "max_num_seqs": 64,
    }
    return Worker(**{**values, **changes})  # type: ignore[arg-type]


def an_adapter(name: str = "ada", digest: str = "d1") -> Adapter:
    return Adapter(name, digest, "/home/ada", 8, created=5.5, warnings=("it is old", "it is slow"))


async def adapters_of(store: StateStore) -> list[Adapter]:
    return list((await store.adapter_changes(0)).put)


def start_writer(url: str, name: str, steps: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, url, name, str(steps)],
        env={**os.environ, "PYTHONPATH": str(SERVICES)},
        stdout=subprocess.PIPE,
        text=True,
    )


async def is_told_of(store: StateStore, change: object, limit: float = 1.0) -> bool:
    """Whether `wait_changed` returns within `limit` seconds of `change`."""
    waiting = asyncio.create_task(store.wait_changed(30))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    await change  # type: ignore[misc]
    try:
        await asyncio.wait_for(waiting, limit)
    except TimeoutError:
        return False
    return True


@pytest.fixture(params=list(STORES))
def url(request: pytest.FixtureRequest, tmp_path: Path, redis_server: RedisServer) -> str:
    return STORES[request.param](tmp_path, redis_server)


@pytest.fixture
async def store(url: str) -> AsyncIterator[StateStore]:
    store = open_store(url)
    yield store
    await store.close()


async def test_starts_empty(store: StateStore) -> None:
    assert await store.workers() == []
    assert await adapters_of(store) == []
    changes = await store.adapter_changes(0)
    assert changes == AdapterChanges(0, (), is_whole=True, epoch=changes.epoch)


async def test_workers_come_back_whole_and_by_id(store: StateStore) -> None:
    late, early = a_worker("w-2", role=Role.PREFILL, adapter_slots=3), a_worker("w-1")
    await store.put_worker(late, LONG)
    await store.put_worker(early, LONG)
    assert await store.workers() == [early, late]


async def test_a_worker_is_replaced(store: StateStore) -> None:
    await store.put_worker(a_worker(kv_blocks=1), LONG)
    await store.put_worker(a_worker(kv_blocks=2), LONG)
    assert await store.workers() == [a_worker(kv_blocks=2)]


async def test_a_worker_that_is_not_renewed_expires(store: StateStore) -> None:
    await store.put_worker(a_worker("gone"), 0.2)
    await store.put_worker(a_worker("renewed"), 0.2)
    await store.put_worker(a_worker("stays"), LONG)
    assert [worker.id for worker in await store.workers()] == ["gone", "renewed", "stays"]
    await store.put_worker(a_worker("renewed"), LONG)
    await asyncio.sleep(0.3)
    for _ in range(2):
        assert [worker.id for worker in await store.workers()] == ["renewed", "stays"]
    await store.put_worker(a_worker("gone"), LONG)
    assert len(await store.workers()) == 3


async def test_a_worker_is_forgotten(store: StateStore) -> None:
    await store.put_worker(a_worker(), LONG)
    await store.remove_worker("decode-0")
    await store.remove_worker("never-there")
    assert await store.workers() == []


async def test_adapters_come_back_whole_and_by_name(store: StateStore) -> None:
    whole = replace(an_adapter("b/é"), size=1 << 40, version=3, pinned=True, stamp="7:8", kind="reft")
    assert await store.put_adapter(whole, expect=None)
    assert await store.put_adapter(an_adapter("a"), expect=None)
    assert await adapters_of(store) == [an_adapter("a"), whole]
    assert await store.adapter("b/é") == whole
    assert await store.adapter("c") is None


async def test_a_name_moves_only_from_the_expected_entry(store: StateStore) -> None:
    one, two = an_adapter(digest="d1"), an_adapter(digest="d2")
    assert not await store.put_adapter(one, expect=two)
    assert await store.put_adapter(one, expect=None)
    assert not await store.put_adapter(two, expect=None)
    assert not await store.put_adapter(two, expect=replace(one, pinned=True))
    assert await adapters_of(store) == [one]
    assert await store.put_adapter(two, expect=one)
    assert await adapters_of(store) == [two]


async def test_an_adapter_is_removed(store: StateStore) -> None:
    await store.put_adapter(an_adapter(), expect=None)
    assert await store.delete_adapter("ada") == an_adapter()
    assert await store.delete_adapter("ada") is None
    assert await adapters_of(store) == []
    assert await store.put_adapter(an_adapter(digest="d2"), expect=None)
    assert await adapters_of(store) == [an_adapter(digest="d2")]


async def test_changes_tell_what_is_new_since_a_revision(store: StateStore) -> None:
    for name in "abc":
        await store.put_adapter(an_adapter(name), expect=None)
    first = await store.adapter_changes(0)
    seen, epoch = first.revision, first.epoch
    assert epoch
    assert await store.adapter_changes(seen) == AdapterChanges(seen, (), (), epoch=epoch)
    await store.put_adapter(an_adapter("b", "d2"), expect=an_adapter("b"))
    await store.delete_adapter("a")
    await store.put_adapter(an_adapter("d"), expect=None)
    await store.delete_adapter("d")
    changes = await store.adapter_changes(seen)
    assert changes == AdapterChanges(changes.revision, (an_adapter("b", "d2"),), ("a", "d"), epoch=epoch)
    assert changes.revision > seen
    assert (await store.adapter_changes(changes.revision)).put == ()


async def test_removals_of_long_ago_are_told_by_the_whole_catalog(
    store: StateStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The names of removed adapters don't pile up; a reader that was away misses none of them."""
    monkeypatch.setattr(sqlite, "KEPT_REMOVALS", 20)
    monkeypatch.setattr(redis_store, "KEPT_CHANGES", 20)
    for name in ("kept", "gone", "back"):
        await store.put_adapter(an_adapter(name), expect=None)
    first = await store.adapter_changes(0)
    await store.delete_adapter("gone")
    await store.delete_adapter("back")
    late = first.revision
    for number in range(20):
        late = (await store.adapter_changes(late)).revision
        await store.put_adapter(an_adapter(f"a{number}"), expect=None)
        await store.delete_adapter(f"a{number}")
    await store.put_adapter(an_adapter("back"), expect=None)
    changes = await store.adapter_changes(first.revision)
    whole = (an_adapter("back"), an_adapter("kept"))
    assert changes == AdapterChanges(changes.revision, whole, is_whole=True, epoch=first.epoch)
    assert await store.adapter_changes(late) == AdapterChanges(
        changes.revision, (an_adapter("back"),), ("a19",), epoch=first.epoch
    )


@pytest.mark.parametrize("seed", range(6))
async def test_a_reader_of_changes_always_has_the_catalog(
    store: StateStore, url: str, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Whatever the order of changes, and however late the reader comes; with so few entries per page that pages mix
    with changes."""
    for module, name, value in (
        (sqlite, "KEPT_REMOVALS", 4),
        (redis_store, "KEPT_CHANGES", 4),
        (redis_store, "PAGE_NAMES", 2),
    ):
        monkeypatch.setattr(module, name, value)
    dice, other = random.Random(seed), open_store(url)
    known, revision = dict[str, Adapter](), 0

    async def change() -> None:
        name = dice.choice("abcdefgh")
        if dice.random() < 0.4:
            await other.delete_adapter(name)
        else:
            await other.put_adapter(an_adapter(name, str(dice.random())), expect=await other.adapter(name))

    for _ in range(60):
        for _ in range(dice.randrange(4)):
            await change()
        changes, _ = await asyncio.gather(store.adapter_changes(revision), change())
        revision = changes.revision
        known = {name: entry for name, entry in known.items() if not changes.is_whole and name not in changes.removed}
        known |= {adapter.name: adapter for adapter in changes.put}
        if dice.random() < 0.3:
            now = await store.adapter_changes(revision)
            assert not now.is_whole or revision == 0
            known = {name: entry for name, entry in known.items() if name not in now.removed}
            known |= {adapter.name: adapter for adapter in now.put}
            revision = now.revision
            assert known == {adapter.name: adapter for adapter in await adapters_of(store)}
    await other.close()


async def test_changes_are_told_at_once(store: StateStore, url: str) -> None:
    """Those of other processes, and the store's own."""
    other = open_store(url)
    await store.wait_changed(0.5)
    for change in (
        other.put_worker(a_worker(), LONG),
        other.put_worker(a_worker(kv_blocks=7), LONG),
        store.put_worker(a_worker("own"), LONG),
        other.remove_worker("decode-0"),
        other.put_adapter(an_adapter(), expect=None),
        store.put_adapter(an_adapter("own"), expect=None),
        other.delete_adapter("ada"),
    ):
        assert await is_told_of(store, change)
    await other.close()


async def test_a_change_between_two_waits_is_told_by_the_second(store: StateStore, url: str) -> None:
    other = open_store(url)
    await other.put_adapter(an_adapter(), expect=None)
    started = time.monotonic()
    await store.wait_changed(20)  # counts from the store's opening
    await other.delete_adapter("ada")
    await asyncio.sleep(0.1)
    await store.wait_changed(20)
    assert time.monotonic() - started < 5
    started = time.monotonic()
    await store.wait_changed(0.3)
    assert 0.25 < time.monotonic() - started < 5
    await other.close()


async def test_a_closed_store_waits_in_silence(url: str) -> None:
    store = open_store(url)
    await store.close()
    started = time.monotonic()
    await store.wait_changed(0.2)
    assert time.monotonic() - started >= 0.19


async def test_another_client_sees_every_change(store: StateStore, url: str) -> None:
    other = open_store(url)
    for change in (
        store.put_adapter(an_adapter("a"), expect=None),
        store.put_adapter(an_adapter("b"), expect=None),
        store.put_adapter(an_adapter("a", "d2"), expect=an_adapter("a")),
        store.delete_adapter("b"),
        store.delete_adapter("a"),
        store.put_worker(a_worker(), LONG),
        store.remove_worker("decode-0"),
    ):
        await change
        assert await other.adapter_changes(0) == await store.adapter_changes(0)
        assert await other.workers() == await store.workers()
    await other.close()


async def test_everything_is_there_after_reopening(url: str) -> None:
    first = open_store(url)
    await first.put_worker(a_worker(), LONG)
    await first.put_adapter(an_adapter(), expect=None)
    await first.close()
    second = open_store(url)
    assert await second.workers() == [a_worker()]
    assert await adapters_of(second) == [an_adapter()]
    await second.close()


async def test_a_closed_store_says_so(url: str) -> None:
    store = open_store(url)
    await store.close()
    await store.close()
    with pytest.raises(Unavailable, match="closed"):
        await store.workers()


async def test_tasks_of_one_process_may_write_at_once(store: StateStore) -> None:
    won = await asyncio.gather(*(store.put_adapter(an_adapter(digest=f"d{i}"), expect=None) for i in range(20)))
    assert sum(won) == 1
    await asyncio.gather(*(store.put_worker(a_worker(f"w-{i:02}"), LONG) for i in range(20)))
    assert len(await store.workers()) == 20


async def test_processes_may_open_and_write_at_once(url: str) -> None:
    """Compare-and-set loses no update: as many versions as wins, although every process started on a missing store."""
    writers = [start_writer(url, f"p{i}", 40) for i in range(4)]
    outputs = [await asyncio.to_thread(writer.communicate) for writer in writers]
    assert [writer.returncode for writer in writers] == [0] * 4
    wins = sum(int(output.split("won")[1]) for output, _ in outputs)
    store = open_store(url)
    assert [adapter.digest for adapter in await adapters_of(store)] == [str(wins)]
    assert len(await store.workers()) == 20
    await store.close()


async def test_a_killed_writer_leaves_a_usable_store(url: str) -> None:
    for round_ in range(3):
        writer = start_writer(url, "victim", 1_000_000)
        assert writer.stdout is not None
        for _ in range(5 + round_):
            await asyncio.to_thread(writer.stdout.readline)
        writer.send_signal(signal.SIGKILL)
        await asyncio.to_thread(writer.communicate)
        store = open_store(url)
        assert 1 <= len(await store.workers()) <= 5
        (shared,) = await adapters_of(store)
        assert await store.put_adapter(replace(shared, digest=str(int(shared.digest) + 1)), expect=shared)
        await store.close()


async def test_records_of_another_version_break_no_reader(store: StateStore, caplog: pytest.LogCaptureFixture) -> None:
    """A newer process may write more fields, or values that this version can't understand."""
    await store.put_adapter(an_adapter("old"), expect=None)
    seen = (await store.adapter_changes(0)).revision
    workers, adapters = store._workers_format, store._adapters_format  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as newer:
        text = '{"id": "more", "role": "decode", "address": "h:1", "zone": {"name": "eu"}}'
        newer.setattr(workers, "write", lambda value: text if value.id == "more" else '{"id": "odd", "role": "judge"}')
        for name in ("more", "odd"):
            await store.put_worker(a_worker(name), LONG)
        more = '{"name": "more", "digest": "d", "source": "/s", "rank": 8, "created": 5, "licence": null}'
        newer.setattr(adapters, "write", lambda value: more if value.name == "more" else '{"name": "odd"}')
        for name in ("more", "old"):
            await store.put_adapter(replace(an_adapter(name), digest="d2"), expect=await store.adapter(name))
    for _ in range(3):
        assert await store.workers() == [Worker("more", Role.DECODE, "h:1")]
        assert await adapters_of(store) == [Adapter("more", "d", "/s", 8, created=5.0)]
    assert (await store.adapter_changes(seen)).removed == ("old",)  # so that nobody gets its former content
    warnings = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 2
    assert (
        "record of Worker 'odd' is skipped: not a record of this version's Worker: role: Input should be" in warnings[0]
    )
    assert "record of Adapter 'old' is skipped" in warnings[1]
    with pytest.raises(Unavailable, match="not a record of this version"):
        await store.adapter("old")
    more_than_known = Adapter("more", "d", "/s", 8, created=5.0)
    assert await store.put_adapter(replace(more_than_known, digest="d3"), expect=more_than_known)


async def test_a_large_cluster_is_read_quickly(store: StateStore) -> None:
    adapters = [replace(an_adapter(f"user/{number:05}", f"{number:064x}"), size=number) for number in range(10_000)]
    workers = [a_worker(f"w-{number:04}") for number in range(1_000)]
    started = time.monotonic()
    if isinstance(store, sqlite.SqliteStore):
        await put_in_one_transaction(store, adapters)  # each `put_adapter` waits for the disk
    else:
        for start in range(0, len(adapters), 50):
            puts = (store.put_adapter(adapter, expect=None) for adapter in adapters[start : start + 50])
            assert all(await asyncio.gather(*puts))
    for start in range(0, len(workers), 50):
        await asyncio.gather(*(store.put_worker(worker, LONG) for worker in workers[start : start + 50]))
    written = time.monotonic()
    changes = await store.adapter_changes(0)
    assert list(changes.put) == adapters
    assert await store.workers() == workers
    read = time.monotonic()
    for _ in range(100):
        assert not (await store.adapter_changes(changes.revision)).put
    polled = (time.monotonic() - read) / 100
    print(
        f"\nwritten in {written - started:.2f} s, read in {read - written:.2f} s, a poll takes {1000 * polled:.2f} ms"
    )
    assert read - written < 5
    assert polled < 0.05


async def put_in_one_transaction(store: sqlite.SqliteStore, adapters: Sequence[Adapter]) -> None:
    def put() -> None:
        with store._change(durable=True):
            for adapter in adapters:
                store._set_record(adapter.name, store._adapters_format.write(adapter))

    await store._run(put)


async def test_clusters_do_not_mix(url: str) -> None:
    """In one Redis they are apart; a file belongs to one of them."""
    one = open_store(url, "one")
    await one.put_worker(a_worker(), LONG)
    await one.put_adapter(an_adapter(), expect=None)
    if url.startswith("sqlite"):
        with pytest.raises(ConfigError, match="belongs to the cluster 'one', not to 'two'"):
            open_store(url, "two")
    else:
        two = open_store(url, "two")
        assert (await two.workers(), await adapters_of(two)) == ([], [])
        assert not await is_told_soon(two, one)
        await two.close()
    await one.close()


async def is_told_soon(store: StateStore, other: StateStore) -> bool:
    await store.wait_changed(0.3)  # the subscription's own start
    return await is_told_of(store, other.put_worker(a_worker("more"), LONG), limit=0.3)


@pytest.mark.parametrize("url", ["sqlite://relative", "postgres://user:hidden-word@h/d", "redis://", "redis://h:x/0"])
def test_an_unknown_url_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="state") as caught:
        open_store(url)
    assert "hidden-word" not in str(caught.value)


def test_errors_are_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(PreftError) as caught:
        open_store(tmp_path / "file" / "state.sqlite")
    assert "can't be opened" in str(caught.value)
