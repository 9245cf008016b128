"""Processes that are killed while they bring in adapters: what they leave is whole, or gone with the next look.

One process forks the victims, so that each is there at once; they are killed at random moments.
"""

from __future__ import annotations

import os
import random
import select
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from preft.adapters.catalog.adapter_catalog import Catalog, CatalogLimits
from preft.adapters.formats.base_model import read_base_model
from preft.adapters.formats.digest import LORA_FILES, adapter_digest
from preft.adapters.sources.limits import SourceLimits
from preft.adapters.sources.source import open_source
from preft.adapters.store import disk_tier
from preft.adapters.store.disk_tier import LOCK, UNFINISHED, DiskTier
from preft.core.cluster import Adapter
from preft.state import open_store
from support.lora_folders import lora_config, write_base, write_lora

SERVICES = Path(disk_tier.__file__).parents[3]
ROUNDS = 15  # with two victims each
ADAPTERS = 8
LIMIT = 1_000_000  # bytes on disk: three adapters
LIMITS = CatalogLimits(max_rank=8, pinned_bytes=LIMIT, max_adapter_bytes=LIMIT, sources=SourceLimits(5.0))

FORKING = """
import asyncio, os, random, signal, sys
from pathlib import Path
from preft.adapters.formats.base_model import read_base_model
from preft.adapters.catalog.adapter_catalog import Catalog, CatalogLimits
from preft.adapters.store.disk_tier import DiskTier
from preft.adapters.sources.limits import SourceLimits
from preft.adapters.sources.source import open_source
from preft.core.errors import ModelNotFound, Unavailable
from preft.state import open_store

here, limit = Path(sys.argv[1]), int(sys.argv[2])
limits = CatalogLimits(8, limit, limit, SourceLimits())

def fetch(chosen):
    tier = DiskTier(here / 'tier', limit, limit)
    sources = [open_source(str(path)) for path in sorted((here / 'sources').iterdir())]
    while True:
        try:
            tier.fetch(chosen.choice(sources), lambda copy: None)
        except Unavailable as error:
            assert 'all taken' in str(error), error

async def change(chosen, archives):
    store = open_store(here / 'state.sqlite')
    tier = DiskTier(here / 'tier', limit, limit)
    catalog = Catalog(store, tier, here / 'uploads', read_base_model(here / 'base'), 'base', limits)
    sources = sorted((here / ('archives' if archives else 'sources')).iterdir())
    while True:
        name = chosen.choice('abc')
        try:
            if chosen.random() < 0.2:
                await catalog.remove(name)
            elif archives:
                await catalog.add_archive(name, chosen.choice(sources), replace=True)
            else:
                await catalog.add(name, str(chosen.choice(sources)), replace=True)
        except ModelNotFound:
            pass
        except Unavailable as error:
            assert 'all taken' in str(error), error

signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
for line in sys.stdin:
    kind, seed = line.split()
    victim = os.fork()
    if victim == 0:
        try:
            chosen = random.Random(int(seed))
            fetch(chosen) if kind == 'fetch' else asyncio.run(change(chosen, kind == 'archive'))
        finally:
            os._exit(1)
    print(victim, flush=True)
"""


class Victims:
    """Starts processes that do one `kind` of work without end, until they are killed."""

    def __init__(self, process: subprocess.Popen[str], kind: str) -> None:
        self._process = process
        self._kind = kind
        self._chosen = random.Random()

    def round(self) -> None:
        """Two begin, and each is killed at some moment of its own."""
        for victim in [self._start() for _ in range(2)]:
            with open(os.pidfd_open(victim)) as process:
                time.sleep(self._chosen.uniform(0.005, 0.06))
                signal.pidfd_send_signal(process.fileno(), signal.SIGKILL)
                dead = select.poll()
                dead.register(process, select.POLLIN)
                assert dead.poll(10_000)  # with all its threads

    def _start(self) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{self._kind} {self._chosen.randrange(1 << 30)}\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())


@contextmanager
def victims(here: Path, kind: str) -> Iterator[Victims]:
    """None of them may have failed before it was killed."""
    errors = here / "errors"
    with (
        open(errors, "w") as stderr,
        subprocess.Popen(
            [sys.executable, "-c", FORKING, str(here), str(LIMIT)],
            env={**os.environ, "PYTHONPATH": str(SERVICES)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        ) as process,
    ):
        yield Victims(process, kind)
        process.communicate()
    assert errors.read_text() == ""


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """Adapters of a third of a megabyte and less, as folders and as archives, and their base model."""
    write_base(tmp_path / "base")
    (tmp_path / "archives").mkdir()
    for number in range(ADAPTERS):
        config = lora_config(prefill_only=True, revision="x" * (50_000 + 30_000 * number))
        folder = write_lora(tmp_path / "sources" / str(number), config, seed=number)
        with tarfile.open(tmp_path / "archives" / f"{number}.tar", "w") as archive:
            archive.add(folder, "adapter")
    return tmp_path


def names_in(tier: Path) -> set[str]:
    return {entry.name for entry in tier.iterdir() if entry.name != LOCK}


def check_tier(here: Path) -> bool:
    """Whatever was done to the tier, all of this holds. Says whether something unfinished was left."""
    known = {adapter_digest(folder) for folder in (here / "sources").iterdir()}
    found = names_in(here / "tier")
    left = {name for name in found if name.startswith(UNFINISHED)}
    for digest in found - left:
        assert digest in known
        assert set(os.listdir(here / "tier" / digest)) == set(LORA_FILES)
        assert adapter_digest(here / "tier" / digest) == digest
    assert sum(file.stat().st_size for file in (here / "tier").rglob("*") if file.is_file()) <= LIMIT
    tier = DiskTier(here / "tier", LIMIT, LIMIT)
    assert tier.used() == sum(
        (here / "tier" / name / file).stat().st_size for name in found - left for file in LORA_FILES
    )
    assert names_in(here / "tier") == found - left
    source = open_source(str(here / "sources" / str(random.randrange(ADAPTERS))))
    digest, _ = tier.fetch(source, lambda copy: None)
    assert tier.find(digest) is not None
    return bool(left)


def test_a_tier_whose_users_are_killed_is_whole(here: Path) -> None:
    DiskTier(here / "tier", LIMIT, LIMIT)
    with victims(here, "fetch") as running:
        interrupted = 0
        for _ in range(ROUNDS):
            running.round()
            interrupted += check_tier(here)
    assert interrupted >= 2


@pytest.mark.parametrize("kind", ["add", "archive"])
async def test_a_catalog_whose_writers_are_killed_names_nothing_that_can_not_be_had(here: Path, kind: str) -> None:
    store = open_store(here / "state.sqlite")
    tier = DiskTier(here / "tier", LIMIT, LIMIT)
    base = read_base_model(here / "base")
    changes, before = 0, 0
    with victims(here, kind) as running:
        for number in range(ROUNDS):
            running.round()
            check_tier(here)
            catalog = Catalog(store, tier, here / "uploads", base, "base", LIMITS)
            await catalog.refresh()
            for entry in catalog.list():
                check_entry(here, entry, kind)
                found, _ = tier.fetch(open_source(entry.source), lambda copy: None, digest=entry.digest)
                assert adapter_digest(tier.root / found) == entry.digest
            revision = (await store.adapter_changes(0)).revision
            changes, before = changes + (revision != before), revision
            own = await catalog.add("own", str(here / "sources" / str(number % ADAPTERS)), replace=True)
            assert own.version == number + 1
    assert changes >= 2
    await store.close()


def check_entry(here: Path, entry: Adapter, kind: str) -> None:
    """Its source is complete."""
    source = Path(entry.source)
    assert adapter_digest(source) == entry.digest
    assert source.parent == here / ("uploads" if kind == "archive" and entry.name != "own" else "sources")
    assert UNFINISHED not in entry.source
