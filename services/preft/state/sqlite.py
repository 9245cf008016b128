"""The state store in one SQLite file, for one machine: any number of processes may have it open.

Owns the file, its schema and the one thread that touches it. Doesn't own what the records mean (`records`), nor when a
worker counts as dead (the router). Write-ahead logging lets readers go on while somebody writes, and a writer that is
killed leaves either its whole change or nothing.
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from preft.core.cluster import Adapter, Worker
from preft.core.errors import ConfigError, Unavailable
from preft.state.records import adapter_from_json, adapter_to_json, worker_from_json, worker_to_json

T = TypeVar("T")

SCHEMA_VERSION = 2  # of tables and records
BUSY_SECONDS = 20.0  # how long a writer waits for another process's write
# The triggers count catalog changes, so that a poll of an unchanged catalog reads one number instead of every row.
SCHEMA = """
CREATE TABLE workers (id TEXT PRIMARY KEY, record TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE adapters (name TEXT PRIMARY KEY, digest TEXT NOT NULL, record TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE catalog (version INTEGER NOT NULL);
INSERT INTO catalog VALUES (0);
CREATE TRIGGER adapter_added AFTER INSERT ON adapters BEGIN UPDATE catalog SET version = version + 1; END;
CREATE TRIGGER adapter_changed AFTER UPDATE ON adapters BEGIN UPDATE catalog SET version = version + 1; END;
CREATE TRIGGER adapter_removed AFTER DELETE ON adapters BEGIN UPDATE catalog SET version = version + 1; END;
"""


class SqliteStore:
    """A StateStore. Every method raises Unavailable if the file can't be read or written."""

    def __init__(self, path: Path) -> None:
        """Opens or creates the file at `path`, and its folder. Raises ConfigError if it isn't this version's store."""
        self._path = path
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="state")
        self._catalog: tuple[int, list[Adapter]] = (-1, [])
        self._closed = False
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = self._thread.submit(self._open).result()
        except (sqlite3.Error, OSError) as error:
            self._thread.shutdown()
            raise ConfigError(f"the state store {path} can't be opened: {error}") from error
        except ConfigError:
            self._thread.shutdown()
            raise

    async def put_worker(self, worker: Worker) -> None:
        """Registers `worker`, or refreshes it."""
        record = worker_to_json(worker)
        statement = "INSERT OR REPLACE INTO workers VALUES (?, ?)"
        await self._run(lambda: self._write(statement, worker.id, record, durable=False))

    async def remove_worker(self, worker_id: str) -> None:
        """Forgets a worker; unknown ids are fine."""
        await self._run(lambda: self._write("DELETE FROM workers WHERE id = ?", worker_id, durable=False))

    async def workers(self) -> list[Worker]:
        """All registered workers, by id."""
        return await self._run(self._workers)

    async def put_adapter(self, adapter: Adapter, *, expect_digest: str | None = None) -> bool:
        """Points the name to this version; with `expect_digest`, only if it holds that digest now ("" = absent)."""
        return await self._run(lambda: self._put_adapter(adapter, expect_digest))

    async def delete_adapter(self, name: str) -> bool:
        """Removes a name; False if it wasn't there."""
        return await self._run(lambda: self._write("DELETE FROM adapters WHERE name = ?", name, durable=True)) > 0

    async def adapters(self) -> list[Adapter]:
        """The whole catalog, by name."""
        return await self._run(self._adapters)

    async def close(self) -> None:
        """Closes the file. A second call does nothing; any other call after it raises Unavailable."""
        if not self._closed:
            self._closed = True
            await asyncio.wrap_future(self._thread.submit(self._db.close))
            self._thread.shutdown()

    async def _run(self, work: Callable[[], T]) -> T:
        if self._closed:
            raise Unavailable(f"the state store {self._path} is closed")
        try:
            return await asyncio.wrap_future(self._thread.submit(work))
        except (sqlite3.Error, ValueError) as error:
            raise Unavailable(f"the state store {self._path} can't be used: {error}") from error

    # What follows runs in the store's own thread.

    def _open(self) -> sqlite3.Connection:
        db = sqlite3.connect(self._path, timeout=BUSY_SECONDS, isolation_level=None)
        try:
            _use_write_ahead_log(db)
            with _transaction(db, durable=True):
                (version,) = db.execute("PRAGMA user_version").fetchone()
                if version == 0:
                    for statement in SCHEMA.strip().split("\n"):
                        db.execute(statement)
                    db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
                elif version != SCHEMA_VERSION:
                    raise ConfigError(
                        f"the state store {self._path} has schema version {version}, this program needs "
                        f"{SCHEMA_VERSION}: use another state_dir or the program that wrote it"
                    )
        except BaseException:
            db.close()
            raise
        return db

    def _write(self, statement: str, *values: str, durable: bool) -> int:
        with _transaction(self._db, durable=durable):
            return self._db.execute(statement, values).rowcount

    def _workers(self) -> list[Worker]:
        return [worker_from_json(record) for (record,) in self._db.execute("SELECT record FROM workers ORDER BY id")]

    def _put_adapter(self, adapter: Adapter, expect_digest: str | None) -> bool:
        with _transaction(self._db, durable=True):
            row = self._db.execute("SELECT digest FROM adapters WHERE name = ?", (adapter.name,)).fetchone()
            if expect_digest is not None and (row[0] if row else "") != expect_digest:
                return False
            values = (adapter.name, adapter.digest, adapter_to_json(adapter))
            if row:
                self._db.execute("UPDATE adapters SET digest = ?2, record = ?3 WHERE name = ?1", values)
            else:
                self._db.execute("INSERT INTO adapters VALUES (?1, ?2, ?3)", values)
            return True

    def _adapters(self) -> list[Adapter]:
        (version,) = self._db.execute("SELECT version FROM catalog").fetchone()
        if version != self._catalog[0]:
            # A change between the two reads is read now, and once more at the next call: never missed.
            rows = self._db.execute("SELECT record FROM adapters ORDER BY name")
            self._catalog = (version, [adapter_from_json(record) for (record,) in rows])
        return list(self._catalog[1])


def _use_write_ahead_log(db: sqlite3.Connection) -> None:
    """Switches the file to WAL. SQLite doesn't wait for other openers here, so this does."""
    give_up = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            db.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > give_up:
                raise
            time.sleep(0.01)


@contextmanager
def _transaction(db: sqlite3.Connection, *, durable: bool) -> Iterator[None]:
    """All or nothing. Takes the write lock at once: upgrading a read lock later can fail without waiting.

    What is `durable` survives a power cut, so it waits for the disk: heartbeats don't, or a slow disk would look like
    dead workers.
    """
    db.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        db.execute("ROLLBACK")
        raise
    db.execute("COMMIT")
