"""What only the SQLite store can get wrong: the file itself."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from preft.core.errors import ConfigError, Unavailable
from preft.state import open_store


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
