"""What only the SQLite store can get wrong: the file itself."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from preft.core.cluster import Adapter, Role, Worker
from preft.core.errors import ConfigError
from preft.state import open_store
from preft.state.sqlite import ADAPTERS, ROOM_BYTES, SqliteStore

WORKER = Worker("w", Role.PREFILL, "127.0.0.1:4000", "f", 1)
VERSION_4 = f"""
CREATE TABLE workers (id TEXT PRIMARY KEY, record TEXT NOT NULL) WITHOUT ROWID;
INSERT INTO workers VALUES ('w', '{{}}');
PRAGMA user_version = 4;
{ADAPTERS}
"""


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.sqlite"
    path.write_bytes(b"not a database, but long enough to be read as a header" * 40)
    with pytest.raises(ConfigError, match=r"state\.sqlite can't be opened"):
        open_store(path)


async def test_another_schema_version_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "state.sqlite"
    await open_store(path).close()
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(ConfigError, match="schema version 99"):
        open_store(path)


async def test_a_file_of_version_4_keeps_its_catalog(tmp_path: Path) -> None:
    path = tmp_path / "state.sqlite"
    adapter = Adapter("ada", "d" * 64, "/s", 8, created=5.5, warnings=("old",))
    with sqlite3.connect(path) as db:
        db.executescript(VERSION_4)
        db.execute("INSERT INTO adapters VALUES ('ada', 7, ?)", (json.dumps(asdict(adapter)),))
    db.close()
    for workers in ([], [WORKER]):
        store = open_store(path, "model")
        changes = await store.adapter_changes(0)
        assert (changes.revision, changes.put) == (7, (adapter,))
        assert await store.workers() == workers
        await store.put_worker(WORKER, 60)
        await store.close()
    with pytest.raises(ConfigError, match="belongs to the cluster 'model', not to 'other'"):
        open_store(path, "other")


async def test_a_reboot_ends_all_registrations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock counts from the boot: an old registration would live on once the clock comes near."""
    boot_id = tmp_path / "boot_id"
    monkeypatch.setattr("preft.state.sqlite.BOOT_ID", boot_id)
    for boot in ("one", "two"):
        boot_id.write_text(boot)
        store = open_store(tmp_path / "state.sqlite")
        assert await store.workers() == []
        await store.put_worker(WORKER, 60)
        assert await store.workers() == [WORKER]
        await store.close()


async def test_without_boot_ids_a_reboot_is_seen_by_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("preft.state.sqlite.BOOT_ID", tmp_path / "none")
    store = open_store(tmp_path / "state.sqlite")
    await store.put_worker(WORKER, 60)
    assert await store.workers() == [WORKER]
    later = time.clock_gettime(time.CLOCK_BOOTTIME)
    monkeypatch.setattr("preft.state.sqlite.time.clock_gettime", lambda clock: later - 3600)
    assert await store.workers() == []
    await store.close()


async def test_expired_registrations_leave_the_file(tmp_path: Path) -> None:
    store = open_store(tmp_path / "state.sqlite")
    for number in range(5):
        await store.put_worker(replace(WORKER, id=f"w-{number}"), 0.01)
        await asyncio.sleep(0.02)
    await store.put_worker(WORKER, 60)
    rows = await store._run(lambda: store._db.execute("SELECT id FROM workers").fetchall())  # type: ignore[attr-defined]
    assert rows == [("w",)]
    await store.close()


async def test_waiting_survives_a_file_that_can_not_be_read(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "state.sqlite")
    await store._run(store._db.close)
    started = time.monotonic()
    await store.wait_changed(0.3)
    assert time.monotonic() - started >= 0.29
    store._db = sqlite3.connect(tmp_path / "state.sqlite", check_same_thread=False)
    await store.close()


async def test_the_catalog_waits_for_the_disk_and_registrations_do_not(tmp_path: Path) -> None:
    """A disk that is slow for some seconds would otherwise make workers expire."""
    store = SqliteStore(tmp_path / "state.sqlite")
    for write, waits in ((store.remove_worker("w"), False), (store.delete_adapter("a"), True)):
        await write
        (level,) = await store._run(lambda: store._db.execute("PRAGMA synchronous").fetchone())
        assert (level == 2) is waits
    await store.close()


async def test_registrations_need_no_more_disk_than_opening_took(tmp_path: Path) -> None:
    """Or workers would expire while the disk is full."""
    path, log = tmp_path / "state.sqlite", tmp_path / "state.sqlite-wal"
    for _ in range(2):  # the log goes with the last that has it open
        stores = [open_store(path) for _ in range(2)]
        sizes = path.stat().st_size, log.stat().st_size
        assert min(sizes) >= ROOM_BYTES
        for known in range(200):  # 3 MiB of pages for each of them
            for number, store in enumerate(stores):
                await store.put_worker(replace(WORKER, id=f"w-{number}", address="d" * 350 * known), 60)
        assert (path.stat().st_size, log.stat().st_size) == sizes
        for store in stores:
            await store.close()
    assert path.stat().st_size == sizes[0]


async def test_what_a_killed_opener_left_goes(tmp_path: Path) -> None:
    path = tmp_path / "state.sqlite"
    await open_store(path).close()
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE room (zeros BLOB)")
        db.execute("INSERT INTO room VALUES (zeroblob(?))", (ROOM_BYTES,))
    db.close()
    await open_store(path).close()
    with sqlite3.connect(path) as db:
        assert db.execute("SELECT name FROM sqlite_master WHERE name = 'room'").fetchall() == []
    db.close()


async def test_a_disk_without_room_is_no_reason_not_to_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("preft.state.sqlite.ROOM_BYTES", 1 << 60)
    store = open_store(tmp_path / "state.sqlite")
    await store.put_worker(WORKER, 60)
    assert await store.workers() == [WORKER]
    await store.close()
