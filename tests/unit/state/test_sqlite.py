"""What only the SQLite store can get wrong: the file itself."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import time
from dataclasses import replace
from pathlib import Path

import pytest

from preft.core.cluster import Role, Worker, WorkerLoad, WorkerState
from preft.core.errors import ConfigError, Unavailable
from preft.state import GONE_SECONDS, open_store, remove_gone_workers
from preft.state.sqlite import ROOM_BYTES

WORKER = Worker("w", Role.PREFILL, WorkerState.READY, "127.0.0.1:4000", "f", 1)


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


async def test_a_record_of_another_shape_is_an_error_not_half_a_worker(tmp_path: Path) -> None:
    path = tmp_path / "state.sqlite"
    store = open_store(path)
    with sqlite3.connect(path) as db:
        db.execute("""INSERT INTO workers VALUES ('w', '{"id": "w"}')""")
    db.close()
    with pytest.raises(Unavailable, match="not a Worker record"):
        await store.workers()
    await store.close()


async def test_the_catalog_waits_for_the_disk_and_heartbeats_do_not(tmp_path: Path) -> None:
    """A disk that is slow for some seconds would otherwise look like dead workers."""
    store = open_store(tmp_path / "state.sqlite")
    for write, waits in ((store.remove_worker("w"), False), (store.delete_adapter("a"), True)):
        await write
        (level,) = await store._run(lambda: store._db.execute("PRAGMA synchronous").fetchone())
        assert (level == 2) is waits
    await store.close()


async def test_heartbeats_need_no_more_disk_than_opening_took(tmp_path: Path) -> None:
    """Or a disk that is full would look like dead workers."""
    path, log = tmp_path / "state.sqlite", tmp_path / "state.sqlite-wal"
    for _ in range(2):  # the log goes with the last that has it open
        stores = [open_store(path) for _ in range(2)]
        sizes = path.stat().st_size, log.stat().st_size
        assert min(sizes) >= ROOM_BYTES
        for known in range(200):  # 3 MiB of pages for each of them
            load = WorkerLoad(adapters=("d" * 64,) * 5 * known)
            for number, store in enumerate(stores):
                await store.put_worker(replace(WORKER, id=f"w-{number}", load=load))
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
    await store.put_worker(WORKER)
    assert await store.workers() == [WORKER]
    await store.close()


async def test_workers_that_were_silent_for_an_hour_are_removed(tmp_path: Path) -> None:
    store = open_store(tmp_path / "state.sqlite")
    for state in (WorkerState.STARTING, WorkerState.READY):
        for name, silent in (("gone", GONE_SECONDS + 60), ("kept", GONE_SECONDS - 60)):
            worker = replace(WORKER, id=f"{name}-{state.value}", pid=os.getpid(), state=state)
            await store.put_worker(replace(worker, heartbeat=time.time() - silent))
    await remove_gone_workers(store)
    assert [worker.id for worker in await store.workers()] == ["kept-ready", "kept-starting"]
    await store.close()


async def test_workers_whose_process_is_gone_are_removed(tmp_path: Path) -> None:
    ended = await asyncio.create_subprocess_exec("true")
    await ended.wait()
    store = open_store(tmp_path / "state.sqlite")
    for name, pid, silent in (("gone", ended.pid, 11), ("fresh", ended.pid, 1), ("frozen", os.getpid(), 11)):
        await store.put_worker(replace(WORKER, id=name, pid=pid, heartbeat=time.time() - silent))
    await remove_gone_workers(store)
    assert [worker.id for worker in await store.workers()] == ["fresh", "frozen"]
    await store.close()
