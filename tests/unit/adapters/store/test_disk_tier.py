"""The disk tier: never over its limit, never half a copy, whoever fetches, fails or dies."""

from __future__ import annotations

import fcntl
import hashlib
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from preft.adapters.formats.digest import LORA_FILES, adapter_digest
from preft.adapters.sources.limits import SourceLimits
from preft.adapters.sources.source import AdapterSource, open_source
from preft.adapters.store import disk_tier
from preft.adapters.store.disk_tier import GROWTH, LOCK, UNFINISHED, DiskTier
from preft.core.errors import InvalidAdapter, PreftError, SourceNotFound, Unavailable
from support.faulty_http import Faults, serve_folder

CONFIG, WEIGHTS = LORA_FILES
SERVICES = Path(disk_tier.__file__).parents[3]
SIZE = 1000


def write(folder: Path, size: int = SIZE) -> Path:
    """An adapter of `size` bytes; another folder's name is another content."""
    folder.mkdir(parents=True)
    (folder / CONFIG).write_bytes(b"{}")
    (folder / WEIGHTS).write_bytes(random.Random(folder.name).randbytes(size - 2))
    return folder


def source_at(folder: Path, size: int = SIZE) -> AdapterSource:
    return open_source(str(write(folder, size)))


def accept(copy: Path) -> None:
    """A check that everything passes."""


def copies(root: Path) -> set[str]:
    return {entry.name for entry in root.iterdir() if entry.name != LOCK}


def bytes_in(root: Path) -> int:
    """What really lies there. With the tier locked nothing is renamed or removed meanwhile but what was reserved."""
    with open(root / LOCK, "r+b") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        total = 0
        for folder in os.listdir(root):
            for name in LORA_FILES:
                try:
                    total += (root / folder / name).stat().st_size
                except (FileNotFoundError, NotADirectoryError):
                    continue
        return total


def age(tier: DiskTier, *digests: str) -> None:
    """As if they had been used long ago, in this order."""
    for second, digest in enumerate(digests):
        os.utime(tier.root / digest, (second, second))


def all_whole(root: Path) -> bool:
    return all(adapter_digest(root / name) == name for name in copies(root))


@pytest.fixture
def tier(tmp_path: Path) -> DiskTier:
    """Room for three adapters."""
    return DiskTier(tmp_path / "tier", 3 * SIZE, 2 * SIZE)


@contextmanager
def under_way(tier: DiskTier, source: AdapterSource) -> Iterator[None]:
    """Inside, another thread is in the middle of fetching."""
    begun, go_on = threading.Event(), threading.Event()

    def progress(done: int, total: int | None) -> None:
        begun.set()
        assert go_on.wait(30)

    with ThreadPoolExecutor(1) as threads:
        fetched = threads.submit(tier.fetch, source, accept, progress=progress)
        try:
            assert begun.wait(30)
            yield
        finally:
            go_on.set()
            fetched.result()


class Child:
    """Another process, which runs `code` with `root` and `folder` in it, and says `ready` when it has come that far."""

    BEGINNING = (
        "import sys, threading\nfrom pathlib import Path\n"
        "from preft.adapters.store.disk_tier import DiskTier\nfrom preft.adapters.sources.source import open_source\n"
        "from preft.core.errors import PreftError, Unavailable\n"
        "root, folder = Path(sys.argv[1]), Path(sys.argv[2])\n"
        "def ready(*_):\n    print('ready', flush=True)\n    sys.stdin.read()\n"
    )

    def __init__(self, code: str, root: Path, folder: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", self.BEGINNING + code, str(root), str(folder)],
            env={**os.environ, "PYTHONPATH": str(SERVICES)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()

    def end(self) -> str:
        """What else it said, once it has ended well."""
        output, _ = self.process.communicate(timeout=60)
        assert self.process.returncode == 0
        return output


# One copy


def test_a_copy_is_the_adapter_alone_under_its_digest(tier: DiskTier, tmp_path: Path) -> None:
    folder = write(tmp_path / "real")
    linked = tmp_path / "linked"
    linked.mkdir()
    for name in LORA_FILES:
        (linked / name).symlink_to(folder / name)
    (folder / "README.md").write_text("not part of it")
    told: list[tuple[int, int | None]] = []
    for place in (folder, linked):
        digest, verdict = tier.fetch(
            open_source(str(place)), lambda copy: sorted(os.listdir(copy)), progress=lambda *now: told.append(now)
        )
        assert digest == adapter_digest(folder)
        assert verdict == sorted(LORA_FILES)
    assert told == 2 * [(2, SIZE), (SIZE, SIZE)]
    copy = tier.find(digest)
    assert copy == tier.root / digest
    assert adapter_digest(copy) == digest
    assert not any((copy / name).is_symlink() or os.stat(copy / name).st_mode & 0o222 for name in LORA_FILES)
    assert copies(tier.root) == {digest}
    assert tier.bytes_seen == SIZE
    assert tier.used() == SIZE


def test_a_copy_is_not_there_before_it_is_complete_and_checked(tier: DiskTier, tmp_path: Path) -> None:
    source = source_at(tmp_path / "a")
    digest = adapter_digest(tmp_path / "a")
    looks: list[bool] = []

    def look(*_: object) -> None:
        looks.append(tier.find(digest) is None and (tier.root / digest).exists() is False)

    tier.fetch(source, look, progress=look)
    assert looks == [True, True, True]
    assert tier.find(digest) is not None


def test_what_the_check_refuses_is_not_kept(tier: DiskTier, tmp_path: Path) -> None:
    def refuse(copy: Path) -> None:
        raise InvalidAdapter("I don't like it")

    with pytest.raises(InvalidAdapter, match="I don't like it"):
        tier.fetch(source_at(tmp_path / "a"), refuse)
    assert copies(tier.root) == set()
    assert tier.used() == 0


def test_other_content_than_the_expected_is_refused(tier: DiskTier, tmp_path: Path) -> None:
    source = source_at(tmp_path / "a")
    with pytest.raises(InvalidAdapter, match=r"a no longer holds the version that was added: add the adapter again"):
        tier.fetch(source, accept, digest="0" * 64)
    assert copies(tier.root) == set()
    tier.fetch(source, accept, digest=adapter_digest(tmp_path / "a"))


def test_what_is_not_there_is_not_found(tier: DiskTier, tmp_path: Path) -> None:
    assert tier.find("0" * 64) is None
    digest, _ = tier.fetch(source_at(tmp_path / "a"), accept)
    tier.discard(digest)
    tier.discard(digest)
    assert tier.find(digest) is None
    assert copies(tier.root) == set()
    with pytest.raises(SourceNotFound):
        tier.fetch(open_source(str(tmp_path / "nowhere")), accept)


def test_equal_content_fetched_at_once_is_one_copy(tmp_path: Path) -> None:
    folders = [write(tmp_path / str(number) / "same") for number in range(8)]
    tier = DiskTier(tmp_path / "tier", 8 * SIZE, SIZE)
    barrier = threading.Barrier(8)

    def fetch(folder: Path) -> str:
        barrier.wait(10)
        return tier.fetch(open_source(str(folder)), accept)[0]

    with ThreadPoolExecutor(8) as threads:
        found = set(threads.map(fetch, folders))
    assert found == copies(tier.root) == {adapter_digest(folders[0])}
    assert all_whole(tier.root)
    assert tier.used() == SIZE


# Room


def test_the_least_recently_used_goes_first_and_finding_is_a_use(tier: DiskTier, tmp_path: Path) -> None:
    a, b, c = (tier.fetch(source_at(tmp_path / name), accept)[0] for name in "abc")
    age(tier, a, b, c)
    assert tier.find(a) is not None
    d, _ = tier.fetch(source_at(tmp_path / "d"), accept)
    assert copies(tier.root) == {a, c, d}
    assert tier.find(b) is None
    e, _ = tier.fetch(source_at(tmp_path / "e", 2 * SIZE), accept)  # needs the room of two
    assert e in copies(tier.root)
    assert c not in copies(tier.root)
    assert len(copies(tier.root)) == 2
    assert tier.evictions == 3
    assert tier.bytes_seen == 3 * SIZE


def test_fetching_equal_content_is_a_use(tier: DiskTier, tmp_path: Path) -> None:
    a, b = (tier.fetch(source_at(tmp_path / name), accept)[0] for name in "ab")
    age(tier, a, b)
    tier.fetch(open_source(str(tmp_path / "a")), accept)
    c, _ = tier.fetch(source_at(tmp_path / "c", 2 * SIZE), accept)
    assert copies(tier.root) == {a, c}


def test_a_copy_that_took_long_is_as_recent_as_its_end(tier: DiskTier, tmp_path: Path) -> None:
    digest, _ = tier.fetch(source_at(tmp_path / "a"), lambda copy: os.utime(copy, (1, 1)))
    assert time.time() - (tier.root / digest).stat().st_mtime < 60


def test_pinned_copies_stay(tier: DiskTier, tmp_path: Path) -> None:
    a, b, c = (tier.fetch(source_at(tmp_path / name), accept)[0] for name in "abc")
    age(tier, a, b, c)
    tier.pinned = {a, b}
    d, _ = tier.fetch(source_at(tmp_path / "d"), accept)
    assert copies(tier.root) == {a, b, d}
    tier.pinned = {a, b, d}
    with pytest.raises(Unavailable, match="all taken by pinned ones and those on their way: try again later, or"):
        tier.fetch(source_at(tmp_path / "e"), accept)
    assert copies(tier.root) == {a, b, d}
    tier.pinned = {b, d}
    tier.fetch(open_source(str(tmp_path / "e")), accept)
    assert a not in copies(tier.root)


def test_what_other_processes_brought_counts(tmp_path: Path) -> None:
    one, two = (DiskTier(tmp_path / "tier", 3 * SIZE, 3 * SIZE) for _ in range(2))
    a, _ = one.fetch(source_at(tmp_path / "a"), accept)
    b, _ = two.fetch(source_at(tmp_path / "b"), accept)
    c, _ = two.fetch(source_at(tmp_path / "c"), accept)
    age(one, a, b, c)
    d, _ = one.fetch(source_at(tmp_path / "d"), accept)
    assert copies(one.root) == {b, c, d}
    one.discard(b)
    one.discard(c)
    two.pinned = {d}
    two.fetch(source_at(tmp_path / "e", 2 * SIZE), accept)  # it is known that there is room
    assert two.bytes_seen == two.used() == 3 * SIZE
    assert two.evictions == 0


def test_no_file_stays_open(tier: DiskTier, tmp_path: Path) -> None:
    good, bad = source_at(tmp_path / "good"), source_at(tmp_path / "bad")
    tier.fetch(good, accept)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        tier.fetch(good, accept)
        with pytest.raises(InvalidAdapter):
            tier.fetch(bad, accept, digest="0" * 64)
        tier.find(adapter_digest(tmp_path / "good"))
    assert len(os.listdir("/proc/self/fd")) == before


def test_nothing_is_evicted_in_vain(tier: DiskTier, tmp_path: Path) -> None:
    a, b = (tier.fetch(source_at(tmp_path / name), accept)[0] for name in "ab")
    tier.pinned = {a}
    with under_way(tier, source_at(tmp_path / "c")), pytest.raises(Unavailable, match="all taken"):
        tier.fetch(source_at(tmp_path / "d", 2 * SIZE), accept)
    assert {a, b} < copies(tier.root)


def test_those_on_their_way_have_their_room(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path / "tier", 2 * SIZE, 2 * SIZE)
    other_process = DiskTier(tmp_path / "tier", 2 * SIZE, 2 * SIZE)
    with under_way(tier, source_at(tmp_path / "large", 2 * SIZE)):
        assert other_process.used() == 2 * SIZE
        with pytest.raises(Unavailable, match="all taken by pinned ones and those on their way"):
            other_process.fetch(source_at(tmp_path / "small"), accept)
    other_process.fetch(open_source(str(tmp_path / "small")), accept)
    assert copies(tier.root) == {adapter_digest(tmp_path / "small")}


@pytest.mark.parametrize("lengthless", [False, True])
@pytest.mark.parametrize(
    ("limit", "max_adapter_bytes", "message"),
    [
        (9 * SIZE, SIZE, r"more than 1000 bytes, the limit of store\.max_adapter_bytes"),
        (SIZE, 9 * SIZE, r"more than 1000 bytes, which all copies on disk may have: raise store\.disk_bytes"),
    ],
)
def test_what_is_too_large_is_refused_for_good(
    tmp_path: Path, lengthless: bool, limit: int, max_adapter_bytes: int, message: str
) -> None:
    tier = DiskTier(tmp_path / "tier", limit, max_adapter_bytes)
    write(tmp_path / "served" / "fits", SIZE)
    write(tmp_path / "served" / "too-large", SIZE + 1)
    with serve_folder(tmp_path / "served", Faults(lengthless=lengthless)) as server:
        tier.fetch(open_source(f"{server.url}/fits"), accept)
        with pytest.raises(InvalidAdapter, match=message):
            tier.fetch(open_source(f"{server.url}/too-large"), accept)
    assert all_whole(tier.root)
    assert len(copies(tier.root)) <= 1


def test_a_source_of_unknown_size_reserves_as_it_comes(tmp_path: Path) -> None:
    size = 2 * GROWTH + 5_000_000
    tier = DiskTier(tmp_path / "tier", 3 * GROWTH, 3 * GROWTH)
    write(tmp_path / "served" / "a", size)
    old, _ = tier.fetch(source_at(tmp_path / "old"), accept)
    reserved: list[int] = []

    def progress(done: int, total: int | None) -> None:
        assert total is None
        (name,) = (name for name in os.listdir(tier.root) if name.startswith(UNFINISHED))
        reserved.append(int(name.rpartition("-")[2]))
        assert done <= reserved[-1]
        assert tier.used() <= tier.limit

    with serve_folder(tmp_path / "served", Faults(lengthless=True)) as server:
        digest, _ = tier.fetch(open_source(f"{server.url}/a"), accept, progress=progress)
    assert digest == adapter_digest(tmp_path / "served" / "a")
    assert sorted(set(reserved)) == [GROWTH, 2 * GROWTH, 3 * GROWTH]
    assert copies(tier.root) == {digest}
    assert old != digest
    assert tier.bytes_seen == size
    assert tier.used() == size


def test_a_limit_that_was_lowered_is_reached_with_the_next_fetch(tier: DiskTier, tmp_path: Path) -> None:
    for name in "abc":
        tier.fetch(source_at(tmp_path / name), accept)
    smaller = DiskTier(tier.root, 2 * SIZE, 2 * SIZE)
    digest, _ = smaller.fetch(source_at(tmp_path / "d"), accept)
    assert digest in copies(tier.root)
    assert smaller.used() == 2 * SIZE


FETCHING = """
import random
tier = DiskTier(root, 4000, 4000)
chosen = random.Random(0)
print('ready', flush=True)
for _ in range(25):
    try:
        tier.fetch(open_source(str(folder / str(chosen.randrange(12)))), lambda copy: None)
    except Unavailable:
        pass
"""


def test_the_limit_holds_while_threads_and_processes_fetch_at_once(tmp_path: Path) -> None:
    """Sizes known and unknown. Whoever finds no room is told so; who does has the whole content."""
    served = tmp_path / "served"
    digests = [adapter_digest(write(served / str(number), 500 + 130 * number)) for number in range(12)]
    tier = DiskTier(tmp_path / "tier", 4000, 4000)
    over = threading.Event()
    seen: list[int] = []
    fetched: list[int] = []

    def observe() -> None:
        while not over.is_set():
            seen.append(bytes_in(tier.root))
            assert tier.used() <= tier.limit

    def fetch(worker: int) -> None:
        chosen = random.Random(worker)
        for _ in range(15):
            number = chosen.randrange(12)
            place = f"{server.url}/{number}" if worker % 2 else str(served / str(number))
            try:
                digest, _ = tier.fetch(open_source(place), accept, digest=digests[number])
            except Unavailable as error:
                assert "all taken" in str(error)  # noqa: PT017
            else:
                assert digest == digests[number]
                fetched.append(number)

    with serve_folder(served, Faults(lengthless=True)) as server, ThreadPoolExecutor(7) as threads:
        children = [Child(FETCHING, tier.root, served) for _ in range(2)]
        for child in children:
            assert child.line() == "ready"
        observer = threads.submit(observe)
        workers = [threads.submit(fetch, worker) for worker in range(6)]
        try:
            for worker in workers:
                worker.result()
            for child in children:
                child.end()
        finally:
            over.set()
        observer.result()
    assert len(seen) > 20
    assert max(seen) <= tier.limit
    assert len(fetched) > 20
    assert tier.evictions > 5
    assert copies(tier.root) <= set(digests)
    assert all_whole(tier.root)


def test_ten_thousand_copies_are_no_burden(tmp_path: Path) -> None:
    """In processor time, so that a busy machine fails nothing."""
    root = tmp_path / "tier"
    digests = [hashlib.sha256(str(number).encode()).hexdigest() for number in range(10_000)]
    for digest in digests:
        os.makedirs(root / digest)
        (root / digest / CONFIG).write_bytes(b"0123456789")
    tier = DiskTier(root, 100_000, 1000)
    started = time.process_time()
    for digest in digests[:1000]:
        assert tier.find(digest) is not None
    assert time.process_time() - started < 1  # 1 ms each
    fetches = [source_at(tmp_path / f"new{number}", 100) for number in range(10)]
    started = time.process_time()
    for source in fetches:
        tier.fetch(source, accept)
    assert time.process_time() - started < 5  # half a second each
    assert tier.evictions == 100
    assert tier.used() == 100_000
    assert all(tier.find(digest) is not None for digest in digests[:1000])


# What goes wrong


def shorten(folder: Path) -> None:
    os.truncate(folder / WEIGHTS, 10)


def lengthen(folder: Path) -> None:
    with open(folder / WEIGHTS, "ab") as file:
        file.write(b"more")


def remove_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()


def remove_all(folder: Path) -> None:
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (shorten, "changed while it was read: add it again when it is complete"),
        (lengthen, "changed while it was read: add it again when it is complete"),
        (remove_weights, "is missing in"),
        (remove_all, "is missing in"),
    ],
)
def test_a_folder_that_changes_under_the_reader_is_refused(
    tier: DiskTier, tmp_path: Path, change: Callable[[Path], None], message: str
) -> None:
    folder = write(tmp_path / "a")
    changes = iter([change])

    def progress(done: int, total: int | None) -> None:
        for late in changes:
            late(folder)

    with pytest.raises(InvalidAdapter, match=rf"adapter_model\.safetensors .*{message}"):
        tier.fetch(open_source(str(folder)), accept, progress=progress)
    assert copies(tier.root) == set()
    assert tier.used() == 0


@pytest.mark.parametrize(
    "faults",
    [
        Faults(cut_after=500),
        Faults(drop_after=500),
        Faults(stall_after=500),
        Faults(status={WEIGHTS: 503}),
        Faults(stall_after=500, lengthless=True),
    ],
    ids=["cut", "drop", "stall", "status", "stall-lengthless"],
)
def test_a_server_that_fails_leaves_nothing(tier: DiskTier, tmp_path: Path, faults: Faults) -> None:
    write(tmp_path / "served" / "a")
    with serve_folder(tmp_path / "served", faults) as server:
        with pytest.raises(Unavailable, match=f"{server.url}/a can't be read: .+"):
            tier.fetch(open_source(f"{server.url}/a", SourceLimits(0.2)), accept)
        assert copies(tier.root) == set()
        assert tier.used() == 0


def test_a_lengthless_file_that_was_cut_is_not_taken_for_the_expected_one(tier: DiskTier, tmp_path: Path) -> None:
    """Nothing but the digest can tell: the end of the connection is the end of the file."""
    digest = adapter_digest(write(tmp_path / "served" / "a"))
    with (
        serve_folder(tmp_path / "served", Faults(lengthless=True, cut_after=500)) as server,
        pytest.raises(InvalidAdapter, match="no longer holds the version"),
    ):
        tier.fetch(open_source(f"{server.url}/a"), accept, digest=digest)
    assert copies(tier.root) == set()


DISK_FULL = """
import resource
tier = DiskTier(root, 10**9, 10**9)
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
try:
    tier.fetch(open_source(str(folder)), lambda copy: None)
except PreftError as error:
    print(type(error).__name__, error)
print(sorted(path.name for path in root.iterdir()), tier.used())
"""


def test_a_disk_that_takes_no_more_is_unavailable(tmp_path: Path) -> None:
    child = Child(DISK_FULL, tmp_path / "tier", write(tmp_path / "a", 3_000_000))
    assert child.end() == (f"Unavailable adapters can't be kept on the server's disk: File too large\n['{LOCK}'] 0\n")


def test_a_folder_that_can_not_be_used_is_unavailable(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(Unavailable, match=r"adapters can't be kept on the server's disk: Not a directory"):
        DiskTier(tmp_path / "file" / "tier", SIZE, SIZE)
    tier = DiskTier(tmp_path / "tier", SIZE, SIZE)
    shutil.rmtree(tier.root)
    tier.root.write_text("x")
    with pytest.raises(Unavailable, match="adapters can't be kept on the server's disk"):
        tier.fetch(source_at(tmp_path / "a"), accept)
    with pytest.raises(Unavailable, match="adapters can't be read from the server's disk"):
        tier.find("0" * 64)


def test_what_else_lies_there_is_left_alone(tier: DiskTier, tmp_path: Path) -> None:
    (tier.root / "lost+found").mkdir()
    (tier.root / "lost+found" / "file").write_bytes(bytes(5 * SIZE))
    (tier.root / "notes.txt").write_text("mine")
    for name in "abcdef":
        tier.fetch(source_at(tmp_path / name), accept)
    assert tier.used() == 3 * SIZE
    assert (tier.root / "lost+found" / "file").exists()
    assert (tier.root / "notes.txt").exists()


# Processes that die


UNDER_WAY = "DiskTier(root, 9000, 9000).fetch(open_source(str(folder)), lambda copy: None, progress=ready)\n"


def test_what_a_living_process_works_on_stays_and_what_a_dead_one_left_goes(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path / "tier", 2 * SIZE, 2 * SIZE)
    children = [Child(UNDER_WAY, tier.root, write(tmp_path / name)) for name in "ab"]
    try:
        for child in children:
            assert child.line() == "ready"
        assert tier.used() == 2 * SIZE
        assert len(copies(tier.root)) == 2
        with pytest.raises(Unavailable, match="those on their way"):
            tier.fetch(source_at(tmp_path / "c"), accept)
        children[0].kill()
        assert tier.used() == SIZE
        assert len(copies(tier.root)) == 1
        digest, _ = tier.fetch(open_source(str(tmp_path / "c")), accept)
        children[1].end()
        assert copies(tier.root) == {digest, adapter_digest(tmp_path / "b")}
    finally:
        for child in children:
            child.kill()


def test_leftovers_of_any_kind_are_cleared_at_once(tmp_path: Path) -> None:
    root = tmp_path / "tier"
    for name in (f"{UNFINISHED}0123-500", f"{UNFINISHED}4567-0", f"{UNFINISHED}older"):
        write(root / name)
    assert DiskTier(root, 10 * SIZE, SIZE).used() == 0
    assert copies(root) == set()


def test_a_failing_fetch_is_no_business_of_the_others(tier: DiskTier, tmp_path: Path) -> None:
    good, bad = source_at(tmp_path / "good"), source_at(tmp_path / "bad")
    with under_way(tier, good):
        (tmp_path / "bad" / CONFIG).unlink()
        with pytest.raises(PreftError):
            tier.fetch(bad, accept)
    assert copies(tier.root) == {adapter_digest(tmp_path / "good")}
