"""What every state store promises. A new store joins by one more entry in STORES."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from preft.core.cluster import Adapter, Role, Worker, WorkerLoad, WorkerState
from preft.core.errors import ConfigError, PreftError, Unavailable
from preft.core.ports import AdapterChanges, StateStore
from preft.state import open_store
from preft.state.sqlite import KEPT_REMOVALS

STORES: dict[str, Callable[[Path], str]] = {"sqlite": lambda folder: f"sqlite://{folder}/state/cluster.sqlite"}

SERVICES = Path(__file__).parents[2] / "services"

# Each writer registers its own workers and moves one shared adapter along, version by version.
WRITER = """
import asyncio, sys
from dataclasses import replace
from preft.core.cluster import Adapter, Role, Worker, WorkerState
from preft.state import open_store

async def main(url, name, steps):
    store = open_store(url)
    won = 0
    for step in range(steps):
        worker = Worker(f"{name}-{step % 5}", Role.DECODE, WorkerState.READY, "h:1", "f", 1, heartbeat=float(step))
        await store.put_worker(worker)
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
        "state": WorkerState.READY,
        "address": "127.0.0.1:5000",
        "fingerprint": "llama/f32",
        "pid": 12,
        "engine_pids": (13, 14),
        "max_model_len": 2048,
        "max_num_seqs": 64,
        "heartbeat": 1234.5,
        "load": WorkerLoad(running=3, kv_blocks_total=100, kv_blocks_free=40, adapters=("d1", "d2")),
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


@pytest.fixture(params=list(STORES))
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return STORES[request.param](tmp_path)


@pytest.fixture
async def store(url: str) -> AsyncIterator[StateStore]:
    store = open_store(url)
    yield store
    await store.close()


async def test_starts_empty(store: StateStore) -> None:
    assert await store.workers() == []
    assert await adapters_of(store) == []
    assert await store.adapter_changes(0) == AdapterChanges(0, (), is_whole=True)


async def test_workers_come_back_whole_and_by_id(store: StateStore) -> None:
    late, early = a_worker("w-2", role=Role.PREFILL, state=WorkerState.DRAINING), a_worker("w-1")
    await store.put_worker(late)
    await store.put_worker(early)
    assert await store.workers() == [early, late]


async def test_a_worker_is_refreshed(store: StateStore) -> None:
    await store.put_worker(a_worker(heartbeat=1.0))
    await store.put_worker(a_worker(heartbeat=2.0))
    assert await store.workers() == [a_worker(heartbeat=2.0)]


async def test_a_worker_is_forgotten(store: StateStore) -> None:
    await store.put_worker(a_worker())
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
    seen = (await store.adapter_changes(0)).revision
    assert await store.adapter_changes(seen) == AdapterChanges(seen, (), ())
    await store.put_adapter(an_adapter("b", "d2"), expect=an_adapter("b"))
    await store.delete_adapter("a")
    await store.put_adapter(an_adapter("d"), expect=None)
    await store.delete_adapter("d")
    changes = await store.adapter_changes(seen)
    assert changes == AdapterChanges(changes.revision, (an_adapter("b", "d2"),), ("a", "d"))
    assert changes.revision > seen
    assert (await store.adapter_changes(changes.revision)).put == ()


async def test_removals_of_long_ago_are_told_by_the_whole_catalog(store: StateStore) -> None:
    """The names of removed adapters don't pile up; a reader that was away misses none of them."""
    for name in ("kept", "gone", "back"):
        await store.put_adapter(an_adapter(name), expect=None)
    seen = (await store.adapter_changes(0)).revision
    await store.delete_adapter("gone")
    await store.delete_adapter("back")
    for number in range(KEPT_REMOVALS):
        await store.put_adapter(an_adapter(f"a{number}"), expect=None)
        await store.delete_adapter(f"a{number}")
    await store.put_adapter(an_adapter("back"), expect=None)
    changes = await store.adapter_changes(seen)
    assert changes == AdapterChanges(changes.revision, (an_adapter("back"), an_adapter("kept")), is_whole=True)
    late = await store.adapter_changes(changes.revision - 2)
    assert late == AdapterChanges(changes.revision, (an_adapter("back"),), (f"a{KEPT_REMOVALS - 1}",))


async def test_another_client_sees_every_change(store: StateStore, url: str) -> None:
    other = open_store(url)
    for change in (
        store.put_adapter(an_adapter("a"), expect=None),
        store.put_adapter(an_adapter("b"), expect=None),
        store.put_adapter(an_adapter("a", "d2"), expect=an_adapter("a")),
        store.delete_adapter("b"),
        store.delete_adapter("a"),
        store.put_worker(a_worker()),
        store.remove_worker("decode-0"),
    ):
        await change
        assert await other.adapter_changes(0) == await store.adapter_changes(0)
        assert await other.workers() == await store.workers()
    await other.close()


async def test_everything_is_there_after_reopening(url: str) -> None:
    first = open_store(url)
    await first.put_worker(a_worker())
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
    await asyncio.gather(*(store.put_worker(a_worker(f"w-{i:02}")) for i in range(20)))
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


@pytest.mark.parametrize("url", ["redis://h", "sqlite://relative", "postgres://h/d"])
def test_an_unknown_url_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="state store"):
        open_store(url)


def test_errors_are_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(PreftError) as caught:
        open_store(tmp_path / "file" / "state.sqlite")
    assert "can't be opened" in str(caught.value)
