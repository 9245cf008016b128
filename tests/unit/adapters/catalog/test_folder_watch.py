"""Watching a folder of adapters: what comes, changes and goes in it does so in the catalog, and nothing else does."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import time
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from preft.adapters.catalog.folder_watch import FolderWatch
from preft.adapters.sources.source import open_source
from preft.core.cluster import Adapter
from preft.core.errors import InvalidAdapter, ModelNotFound, PreftError, Unavailable
from preft.core.ports import Progress

FILES = ("adapter_config.json", "adapter_model.safetensors")


class ReadingCatalog:
    """An AdapterCatalog in memory that reads local sources. `fail` is raised for the names in it; `reads` counts."""

    def __init__(self) -> None:
        self.entries: dict[str, Adapter] = {}
        self.fail: dict[str, PreftError] = {}
        self.reads: list[str] = []
        self.adding = self.most_at_once = 0

    def get(self, name: str) -> Adapter | None:
        return self.entries.get(name)

    def list(self) -> Sequence[Adapter]:
        return tuple(adapter for _, adapter in sorted(self.entries.items()))

    async def add(self, name: str, source: str, *, replace: bool = False, progress: Progress | None = None) -> Adapter:
        assert replace
        self.reads.append(name)
        self.adding += 1
        self.most_at_once = max(self.most_at_once, self.adding)
        await asyncio.sleep(0.001)
        self.adding -= 1
        if name in self.fail:
            raise self.fail[name]
        opened = open_source(source)
        stamp = opened.stamp()
        content = b"".join(chunk for file in opened.files() for chunk in opened.read(file))
        self.entries[name] = Adapter(name, content.decode(), opened.uri, rank=8, stamp=stamp)
        return self.entries[name]

    async def add_archive(self, name: str, archive: Path, *, replace: bool = False) -> Adapter:
        raise NotImplementedError

    async def pin(self, name: str, pinned: bool) -> Adapter:
        raise NotImplementedError

    async def remove(self, name: str) -> Adapter:
        if name in self.fail:
            raise self.fail[name]
        if name not in self.entries:
            raise ModelNotFound(f"there is no adapter {name!r}")
        return self.entries.pop(name)

    def contents(self) -> dict[str, str]:
        return {name: adapter.digest for name, adapter in self.entries.items()}


def write(folder: Path, content: str) -> Path:
    """An adapter of this content, as its digest will be; files of their own each time."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in zip(FILES, ("", content), strict=True):
        (folder / f".{name}").write_text(text)
        os.replace(folder / f".{name}", folder / name)
    return folder


async def rounds(watch: FolderWatch, count: int = 2) -> None:
    for _ in range(count):
        await watch.scan()


@pytest.fixture
def catalog() -> ReadingCatalog:
    return ReadingCatalog()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "adapters").mkdir()
    return tmp_path / "adapters"


@pytest.fixture
def watch(folder: Path, catalog: ReadingCatalog) -> FolderWatch:
    return FolderWatch(folder, catalog, interval=0.01)


async def test_a_folder_is_taken_once_it_rests(watch: FolderWatch, folder: Path, catalog: ReadingCatalog) -> None:
    (folder / "README.md").write_text("not an adapter")
    write(folder / "ada", "1")
    await watch.scan()
    assert catalog.contents() == {}
    write(folder / "ada", "2")  # still being copied
    await watch.scan()
    assert catalog.contents() == {}
    await watch.scan()
    assert catalog.contents() == {"ada": "2"}
    assert catalog.entries["ada"].source == str(folder / "ada")
    await rounds(watch, 3)
    assert catalog.reads == ["ada"]


async def test_a_changed_folder_is_read_again(watch: FolderWatch, folder: Path, catalog: ReadingCatalog) -> None:
    write(folder / "ada", "1")
    await rounds(watch)
    write(folder / "ada", "2")
    await watch.scan()
    assert catalog.contents() == {"ada": "1"}
    await rounds(watch, 3)
    assert catalog.contents() == {"ada": "2"}
    assert catalog.reads == ["ada", "ada"]


async def test_a_folder_that_is_gone_for_two_rounds_is_removed(
    watch: FolderWatch, folder: Path, catalog: ReadingCatalog
) -> None:
    for name in ("ada", "bob"):
        write(folder / name, name)
    await rounds(watch)
    (folder / "ada").rename(folder / ".ada")  # swapped for another
    await watch.scan()
    (folder / ".ada").rename(folder / "ada")
    await rounds(watch, 3)
    assert set(catalog.entries) == {"ada", "bob"}
    shutil.rmtree(folder / "ada")
    await rounds(watch)
    assert set(catalog.entries) == {"bob"}
    assert catalog.reads == ["ada", "bob"]


async def test_a_disk_that_is_not_mounted_removes_nothing(
    folder: Path, catalog: ReadingCatalog, caplog: pytest.LogCaptureFixture
) -> None:
    """At a start, and while it is served: an empty folder is in its place."""
    write(folder / "ann", "one")
    watch = FolderWatch(folder, catalog, interval=0.01)
    await watch.scan()
    await watch.scan()
    disk = folder.with_name("disk")
    os.rename(folder, disk)
    write(folder / "lost+found", "").joinpath(FILES[0]).unlink()
    for one in (watch, FolderWatch(folder, catalog, interval=0.01)):
        for _ in range(4):
            await one.scan()
    assert catalog.contents() == {"ann": "one"}
    assert sum("is its disk mounted?" in record.message for record in caplog.records) == 2
    shutil.rmtree(folder)
    os.rename(disk, folder)
    shutil.rmtree(folder / "ann")
    write(folder / "bob", "two")
    for _ in range(3):
        await watch.scan()
    assert catalog.contents() == {"bob": "two"}
    shutil.rmtree(folder / "bob")  # the last one, from the folder that held it
    for _ in range(2):
        await watch.scan()
    assert catalog.contents() == {}


async def test_the_folder_is_right(watch: FolderWatch, folder: Path, catalog: ReadingCatalog) -> None:
    write(folder / "ada", "1")
    await rounds(watch)
    await catalog.remove("ada")
    await rounds(watch)
    assert catalog.contents() == {"ada": "1"}


async def test_adapters_from_elsewhere_are_left_alone(
    watch: FolderWatch, folder: Path, catalog: ReadingCatalog, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    await catalog.add("ada", str(write(tmp_path / "ada", "elsewhere")), replace=True)
    await catalog.add("eve", str(write(tmp_path / "eve", "elsewhere")), replace=True)
    await catalog.add("other-name", str(write(folder / "bob", "1")), replace=True)
    write(folder / "ada", "1")
    await rounds(watch, 3)
    shutil.rmtree(folder / "bob")
    await rounds(watch, 3)
    assert catalog.contents() == {"ada": "elsewhere", "eve": "elsewhere", "other-name": "1"}
    assert caplog.text.count("the adapter of that name is from") == 1


async def test_known_folders_are_not_read_again_after_a_restart(
    folder: Path, catalog: ReadingCatalog, tmp_path: Path
) -> None:
    for name in ("ada", "bob", "eve"):
        write(folder / name, name)
    await rounds(FolderWatch(folder, catalog))
    catalog.reads.clear()
    write(folder / "bob", "changed meanwhile")
    shutil.rmtree(folder / "eve")
    await rounds(FolderWatch(folder, catalog), 3)
    assert catalog.reads == ["bob"]
    assert catalog.contents() == {"ada": "ada", "bob": "changed meanwhile"}


async def test_a_catalog_without_stamps_reads_once(watch: FolderWatch, folder: Path, catalog: ReadingCatalog) -> None:
    write(folder / "ada", "1")
    await rounds(watch)
    catalog.entries["ada"] = replace(catalog.entries["ada"], stamp="")
    await rounds(watch, 3)
    assert catalog.reads == ["ada"]


async def test_names_that_can_not_be_are_told_once(
    watch: FolderWatch, folder: Path, catalog: ReadingCatalog, caplog: pytest.LogCaptureFixture
) -> None:
    for name in (".hidden", "a@1", "-a"):
        write(folder / name, "1")
    await rounds(watch, 3)
    assert catalog.reads == []
    assert caplog.text.count("it is left out: ") == 3


async def test_a_name_counts_however_unicode_writes_it(
    watch: FolderWatch, folder: Path, catalog: ReadingCatalog
) -> None:
    decomposed = unicodedata.normalize("NFD", "Müller Söhne")
    write(folder / decomposed, "1")
    write(folder / "stays", "2")
    await rounds(watch)
    assert catalog.contents() == {"Müller Söhne": "1", "stays": "2"}
    assert catalog.entries["Müller Söhne"].source == str(folder / decomposed)
    shutil.rmtree(folder / decomposed)
    again = FolderWatch(folder, catalog, interval=0.01)  # one that hasn't seen the subfolder
    await rounds(again)
    assert catalog.contents() == {"stays": "2"}


async def test_a_refused_folder_waits_for_a_change(
    watch: FolderWatch, folder: Path, catalog: ReadingCatalog, caplog: pytest.LogCaptureFixture
) -> None:
    catalog.fail["ada"] = InvalidAdapter("its rank is too high")
    write(folder / "ada", "1")
    write(folder / "bob", "1")
    await rounds(watch, 4)
    assert catalog.contents() == {"bob": "1"}
    assert sorted(catalog.reads) == ["ada", "bob"]
    assert caplog.text.count("its rank is too high") == 1
    write(folder / "ada", "2")
    await rounds(watch, 4)
    assert caplog.text.count("its rank is too high") == 2
    catalog.fail.clear()
    write(folder / "ada", "3")
    await rounds(watch, 4)
    assert catalog.contents() == {"ada": "3", "bob": "1"}


async def test_a_refused_change_leaves_what_was_there(
    watch: FolderWatch, folder: Path, catalog: ReadingCatalog
) -> None:
    write(folder / "ada", "1")
    await rounds(watch)
    catalog.fail["ada"] = InvalidAdapter("its rank is too high")
    write(folder / "ada", "2")
    await rounds(watch, 3)
    assert catalog.contents() == {"ada": "1"}
    assert catalog.reads == ["ada", "ada"]


async def test_a_failing_disk_or_store_is_tried_again(
    watch: FolderWatch, folder: Path, catalog: ReadingCatalog, caplog: pytest.LogCaptureFixture
) -> None:
    catalog.fail["ada"] = Unavailable("the disk is full")
    write(folder / "ada", "1")
    await rounds(watch, 4)
    assert catalog.reads == ["ada"] * 3
    assert caplog.text.count("the disk is full") == 1
    catalog.fail.clear()
    await watch.scan()
    assert catalog.contents() == {"ada": "1"}
    catalog.fail["ada"] = Unavailable("the store is gone")
    shutil.rmtree(folder / "ada")
    await rounds(watch, 4)
    assert caplog.text.count("the store is gone") == 1
    catalog.fail.clear()
    await watch.scan()
    assert catalog.contents() == {}


async def test_half_a_folder_is_told_once_and_taken_when_whole(
    watch: FolderWatch, folder: Path, catalog: ReadingCatalog, caplog: pytest.LogCaptureFixture
) -> None:
    write(folder / "ada", "1")
    (folder / "ada" / FILES[1]).rename(folder / "weights")
    await watch.scan()
    assert caplog.text == ""
    await rounds(watch, 3)
    assert caplog.text.count("adapter_model.safetensors is missing in") == 1
    (folder / "weights").rename(folder / "ada" / FILES[1])
    await rounds(watch)
    assert catalog.contents() == {"ada": "1"}


@pytest.mark.parametrize("make", [lambda folder: None, lambda folder: folder.write_text("a file")])
async def test_a_folder_that_can_not_be_read_removes_nothing(
    watch: FolderWatch,
    folder: Path,
    catalog: ReadingCatalog,
    caplog: pytest.LogCaptureFixture,
    make: Callable[[Path], None],
) -> None:
    write(folder / "ada", "1")
    await rounds(watch)
    unmounted = folder.with_name("unmounted")
    shutil.move(folder, unmounted)
    make(folder)
    await rounds(watch, 3)
    assert catalog.contents() == {"ada": "1"}
    assert caplog.text.count("can't be read") == 1
    with contextlib.suppress(FileNotFoundError):
        os.remove(folder)
    shutil.move(unmounted, folder)
    write(folder / "bob", "2")
    await rounds(watch, 3)
    assert catalog.contents() == {"ada": "1", "bob": "2"}


async def test_links_to_folders_are_adapters_too(
    watch: FolderWatch, folder: Path, catalog: ReadingCatalog, tmp_path: Path
) -> None:
    (folder / "ada").symlink_to(write(tmp_path / "elsewhere", "1"))
    (folder / "loop").symlink_to("loop")
    await rounds(watch)
    assert catalog.contents() == {"ada": "1"}
    (folder / "ada").unlink()
    await rounds(watch)
    assert catalog.contents() == {}


async def test_many_folders_come_a_few_at_a_time(watch: FolderWatch, folder: Path, catalog: ReadingCatalog) -> None:
    names = {f"user-{number}" for number in range(50)}
    for name in names:
        write(folder / name, name)
    await rounds(watch)
    assert catalog.contents() == {name: name for name in names}
    assert catalog.most_at_once == 4


async def test_thousands_of_known_folders_cost_little(
    watch: FolderWatch, folder: Path, catalog: ReadingCatalog
) -> None:
    real = write(folder / "real", "1")
    stamp = open_source(str(real)).stamp()
    for number in range(3_000):
        name = f"user-{number}"
        (folder / name).symlink_to(real)
        catalog.entries[name] = Adapter(name, "1", str(folder / name), rank=8, stamp=stamp)
    await watch.scan()
    started = time.process_time()
    await watch.scan()
    assert time.process_time() - started < 0.5
    assert catalog.reads == ["real"]


async def test_a_round_that_broke_is_made_up_for(watch: FolderWatch, folder: Path, catalog: ReadingCatalog) -> None:
    adding = catalog.adding
    del catalog.adding  # a fault of the catalog's own
    write(folder / "ada", "1")
    with pytest.raises(ExceptionGroup):
        await rounds(watch)
    catalog.adding = adding
    await rounds(watch)
    assert catalog.contents() == {"ada": "1"}


async def test_what_it_did_is_logged(
    watch: FolderWatch, folder: Path, caplog: pytest.LogCaptureFixture, catalog: ReadingCatalog
) -> None:
    caplog.set_level(logging.INFO)
    write(folder / "ada", "1")
    await rounds(watch)
    assert f"adapter 'ada' was taken from {folder}" in caplog.text
    shutil.rmtree(folder / "ada")
    await rounds(watch)
    assert f"adapter 'ada' was removed, as it is no longer in {folder}" in caplog.text
