"""The state store in one SQLite file, for one machine. Any number of processes may open the file.

The store owns the file, its schema and the one thread that accesses it. `records` owns the records' format. With
write-ahead logging, readers go on during a write, and a killed writer leaves either its whole change or none.
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from shutil import disk_usage
from typing import TypeVar

from preft.core.cluster import Adapter, Worker
from preft.core.errors import ConfigError, Unavailable
from preft.core.ports import AdapterChanges
from preft.state.records import Records

T = TypeVar("T")

SCHEMA_VERSION = 5
BUSY_SECONDS = 20.0  # a writer's longest wait for another process's write
LOOK_SECONDS = 0.25  # between two looks for other processes' changes
ROOM_BYTES = 5 << 20  # the log restarts at 1,000 pages (4 MiB), or somewhat later if a process reads at that moment
KEPT_REMOVALS = 1000
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
# `expires` is in seconds since the machine's boot, `boot` names the boot. Nobody can set this clock, and it goes on
# while the machine sleeps.
WORKERS = """
CREATE TABLE workers (
  id TEXT PRIMARY KEY, record TEXT NOT NULL, boot TEXT NOT NULL, expires REAL NOT NULL, lifetime REAL NOT NULL
) WITHOUT ROWID;
"""
IS_LIVE = "boot = ? AND ? < expires AND expires - ? <= lifetime"  # the last rule is for systems without a boot id
# Each change of the catalog has its own revision, so that a poll reads only the changes. A removed adapter's row stays
# without a record, to report the removal, until KEPT_REMOVALS later ones are there. `forgotten` is the revision of the
# latest removal whose row is gone: a reader that hasn't seen this revision gets the whole catalog.
ADAPTERS = """
CREATE TABLE adapters (name TEXT PRIMARY KEY, revision INTEGER NOT NULL, record TEXT) WITHOUT ROWID;
CREATE UNIQUE INDEX adapters_by_revision ON adapters (revision);
CREATE INDEX removed_by_revision ON adapters (revision) WHERE record IS NULL;
CREATE TABLE forgotten (revision INTEGER NOT NULL);
INSERT INTO forgotten VALUES (0);
"""
OWNER = """
CREATE TABLE owner (cluster TEXT NOT NULL, epoch TEXT NOT NULL);
INSERT INTO owner VALUES ('', lower(hex(randomblob(8))));
"""
LAST_TO_FORGET = "SELECT revision FROM adapters WHERE record IS NULL ORDER BY revision DESC LIMIT 1 OFFSET ?"
NEXT_REVISION = "(SELECT coalesce(max(revision), 0) + 1 FROM adapters)"


class SqliteStore:
    """A StateStore. Every method raises Unavailable if the file can't be read or written."""

    def __init__(self, path: Path, cluster: str = "default") -> None:
        """Opens or creates the file at `path`, and its folder, for one `cluster`.

        Raises ConfigError for a file of another version or another cluster.
        """
        self._path = path
        self._cluster = cluster
        self._workers_format, self._adapters_format = Records(Worker), Records(Adapter)
        self._boot = BOOT_ID.read_text().strip() if BOOT_ID.exists() else ""
        self._own_writes = 0
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="state")
        self._closed = False
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = self._thread.submit(self._open).result()
            self._seen = self._thread.submit(self._version).result()
        except (sqlite3.Error, OSError) as error:
            self._thread.shutdown()
            raise ConfigError(f"the state store {path} can't be opened: {error}") from error
        except ConfigError:
            self._thread.shutdown()
            raise

    async def put_worker(self, worker: Worker, lifetime: float) -> None:
        """Adds or replaces the registration of `worker`, for `lifetime` seconds."""
        await self._run(lambda: self._put_worker(worker, lifetime))

    async def remove_worker(self, worker_id: str) -> None:
        """Removes a worker; does nothing for an unknown id."""
        await self._run(lambda: self._write("DELETE FROM workers WHERE id = ?", worker_id, durable=False))

    async def workers(self) -> list[Worker]:
        """All registrations that haven't expired, by id."""
        return await self._run(self._workers)

    async def put_adapter(self, adapter: Adapter, *, expect: Adapter | None) -> bool:
        """Stores the entry if the name's entry is `expect` (None: no entry). Returns False if it isn't."""
        return await self._run(lambda: self._put_adapter(adapter, expect))

    async def delete_adapter(self, name: str) -> Adapter | None:
        """Removes a name. Returns its entry, or None if there was none."""
        return await self._run(lambda: self._delete_adapter(name))

    async def adapter(self, name: str) -> Adapter | None:
        """The name's present entry, or None."""
        return await self._run(lambda: self._adapter(name))

    async def adapter_changes(self, since: int) -> AdapterChanges:
        """The changes after revision `since`, by name."""
        return await self._run(lambda: self._adapter_changes(since))

    async def wait_changed(self, timeout: float) -> None:
        """Returns within LOOK_SECONDS of a change since the last call returned, after `timeout` s at the latest."""
        loop = asyncio.get_running_loop()
        give_up, seen = loop.time() + timeout, self._seen
        while True:
            with suppress(Unavailable):
                self._seen = await self._run(self._version)
            left = give_up - loop.time() if self._seen == seen else 0
            if left <= 0:
                return
            await asyncio.sleep(min(left, LOOK_SECONDS))

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

    # The following methods run in the store's thread.

    def _open(self) -> sqlite3.Connection:
        db = sqlite3.connect(self._path, timeout=BUSY_SECONDS, isolation_level=None)
        try:
            _use_write_ahead_log(db)
            with _transaction(db, durable=True):
                self._make_tables(db)
            self._make_room(db)
        except BaseException:
            db.close()
            raise
        return db

    def _make_tables(self, db: sqlite3.Connection) -> None:
        """Makes the tables of a new file. Keeps the catalog of a file of version 4."""
        (version,) = db.execute("PRAGMA user_version").fetchone()
        if version not in (0, 4, SCHEMA_VERSION):
            raise ConfigError(
                f"the state store {self._path} has schema version {version}, this program needs {SCHEMA_VERSION}: use "
                "another state_dir or the program that wrote it"
            )
        if version == 4:
            db.execute("DROP TABLE workers")
        if version != SCHEMA_VERSION:
            for statement in _statements(WORKERS, ADAPTERS if version == 0 else "", OWNER):
                db.execute(statement)
            db.execute("UPDATE owner SET cluster = ?", (self._cluster,))
            db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        (owner,) = db.execute("SELECT cluster FROM owner").fetchone()
        if owner != self._cluster:
            raise ConfigError(
                f"the state store {self._path} belongs to the cluster {owner!r}, not to {self._cluster!r}: each base "
                "model needs a file of its own"
            )

    def _make_room(self, db: sqlite3.Connection) -> None:
        """Grows the log to its final size, and the file by as many free pages: registrations survive a full disk.

        The last process that closes the log removes it, so the next process grows the log again. If the disk is nearly
        full, the store stays as it is.
        """
        log = Path(f"{self._path.resolve()}-wal")
        with suppress(sqlite3.OperationalError, OSError):
            with _transaction(db, durable=False):
                if log.stat().st_size >= ROOM_BYTES or disk_usage(log.parent).free < 3 * ROOM_BYTES:
                    return
                db.execute("CREATE TABLE IF NOT EXISTS room (zeros BLOB)")
                db.execute("INSERT INTO room VALUES (zeroblob(?))", (ROOM_BYTES,))
            with _transaction(db, durable=False):
                db.execute("DROP TABLE IF EXISTS room")

    def _write(self, statement: str, *values: object, durable: bool) -> None:
        with self._change(durable=durable):
            self._db.execute(statement, values)

    @contextmanager
    def _change(self, *, durable: bool) -> Iterator[None]:
        with _transaction(self._db, durable=durable):
            yield
        self._own_writes += 1

    def _version(self) -> tuple[int, int]:
        """Differs from the last call's if any process has written since."""
        (others,) = self._db.execute("PRAGMA data_version").fetchone()
        return others, self._own_writes

    def _now(self) -> tuple[str, float, float]:
        """The values for IS_LIVE."""
        now = time.clock_gettime(time.CLOCK_BOOTTIME)
        return self._boot, now, now

    def _put_worker(self, worker: Worker, lifetime: float) -> None:
        record, (boot, now, _) = self._workers_format.write(worker), self._now()
        with self._change(durable=False):
            self._db.execute(f"DELETE FROM workers WHERE NOT ({IS_LIVE})", self._now())
            values = worker.id, record, boot, now + lifetime, lifetime
            self._db.execute("INSERT OR REPLACE INTO workers VALUES (?, ?, ?, ?, ?)", values)

    def _workers(self) -> list[Worker]:
        # fetchall: the log can't restart during a read.
        query = f"SELECT id, record FROM workers WHERE {IS_LIVE} ORDER BY id"
        rows = self._db.execute(query, self._now()).fetchall()
        return [worker for row in rows if (worker := self._workers_format.read(*row))]

    def _put_adapter(self, adapter: Adapter, expect: Adapter | None) -> bool:
        with self._change(durable=True):
            if self._adapter(adapter.name) != expect:
                return False
            self._set_record(adapter.name, self._adapters_format.write(adapter))
            return True

    def _delete_adapter(self, name: str) -> Adapter | None:
        with self._change(durable=True):
            current = self._adapter(name)
            if current is not None:
                self._set_record(name, None)
                self._forget_removals()
            return current

    def _forget_removals(self) -> None:
        last = self._db.execute(LAST_TO_FORGET, (KEPT_REMOVALS,)).fetchone()
        if last is not None:
            self._db.execute("DELETE FROM adapters WHERE record IS NULL AND revision <= ?", last)
            self._db.execute("UPDATE forgotten SET revision = ?", last)

    def _set_record(self, name: str, record: str | None) -> None:
        self._db.execute(f"INSERT OR REPLACE INTO adapters VALUES (?, {NEXT_REVISION}, ?)", (name, record))

    def _adapter(self, name: str) -> Adapter | None:
        row = self._db.execute("SELECT record FROM adapters WHERE name = ?", (name,)).fetchone()
        return self._adapters_format.parse(row[0]) if row and row[0] else None

    def _adapter_changes(self, since: int) -> AdapterChanges:
        rows = self._changed_rows(since)
        (forgotten,) = self._db.execute("SELECT revision FROM forgotten").fetchone()  # after the rows: not too low
        (epoch,) = self._db.execute("SELECT epoch FROM owner").fetchone()
        is_whole = since == 0 or since < forgotten
        if is_whole:
            rows = self._changed_rows(0)
        told = [row for row in rows if row[2] or not is_whole]
        read = {name: record and self._adapters_format.read(name, record) for name, _, record in told}
        return AdapterChanges(
            max((revision for _, revision, _ in rows), default=since),
            tuple(adapter for adapter in read.values() if adapter),
            tuple(name for name, adapter in read.items() if not adapter),
            is_whole,
            epoch,
        )

    def _changed_rows(self, since: int) -> list[tuple[str, int, str | None]]:
        return self._db.execute(
            "SELECT name, revision, record FROM adapters WHERE revision > ? ORDER BY name", (since,)
        ).fetchall()


def _use_write_ahead_log(db: sqlite3.Connection) -> None:
    """Switches the file to WAL. SQLite doesn't wait for other openers at this step, so this function does."""
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
    """Commits all statements, or none after an error. BEGIN IMMEDIATE takes the write lock at once, because upgrading a
    read lock can fail without waiting.

    A `durable` transaction survives a power cut, and so waits for the disk. Registrations are not durable: on a slow
    disk the wait would make live workers expire.
    """
    db.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        db.execute("ROLLBACK")
        raise
    db.execute("COMMIT")


def _statements(*scripts: str) -> list[str]:
    return [statement for script in scripts for statement in script.split(";") if statement.strip()]
