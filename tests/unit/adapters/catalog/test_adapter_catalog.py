"""The catalog: content decides the version, names point to it, copies are whole, several processes agree."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import io
import json
import os
import shutil
import sqlite3
import tarfile
import threading
import time
import unicodedata
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from preft.adapters.catalog.adapter_catalog import Catalog, CatalogLimits, CatalogView
from preft.adapters.formats.base_model import BaseModel, read_base_model
from preft.adapters.formats.digest import LORA_FILES, adapter_digest
from preft.adapters.formats.folder import NOT_PREFILL_ONLY
from preft.adapters.formats.folder_texts import OTHER_TEMPLATE
from preft.adapters.sources.archive import unpack_archive
from preft.adapters.sources.limits import SourceLimits, SourceRules
from preft.adapters.sources.source import LocalFolder, open_source
from preft.adapters.store.disk_tier import LOCK, DiskTier
from preft.core.background import Background
from preft.core.cluster import Adapter
from preft.core.errors import (
    AdapterExists,
    ConfigError,
    InvalidAdapter,
    InvalidRequest,
    ModelNotFound,
    SourceNotFound,
    TooManyBytes,
    Unavailable,
)
from preft.core.ports import AdapterChanges, StateStore
from preft.state import open_store, sqlite
from preft.state.sqlite import SqliteStore
from support.faulty_http import Faults, serve_folder
from support.lora_folders import lora_config, lora_tensors, write_base, write_lora
from support.worker_services import until

LIMITS = CatalogLimits(max_rank=8, pinned_bytes=1_000_000, max_adapter_bytes=100_000, sources=SourceLimits(5.0))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    return read_base_model(write_base(tmp_path_factory.mktemp("base")))


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[StateStore]:
    store = open_store(tmp_path / "state.sqlite")
    yield store
    await store.close()


@pytest.fixture
def disk(tmp_path: Path) -> DiskTier:
    return DiskTier(tmp_path / "kept", 1_000_000, LIMITS.max_adapter_bytes)


@pytest.fixture
def catalog(store: StateStore, disk: DiskTier, base: BaseModel, tmp_path: Path) -> Catalog:
    return Catalog(store, disk, tmp_path / "uploads", base, "base", LIMITS)


def kept(tmp_path: Path) -> list[str]:
    return sorted(entry.name for entry in (tmp_path / "kept").iterdir() if entry.name != LOCK)


def uploads(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "uploads").iterdir()) if (tmp_path / "uploads").exists() else []


def size_of(folder: Path) -> int:
    return sum((folder / name).stat().st_size for name in LORA_FILES)


def tar_of(folder: Path) -> Path:
    """The folder as an archive, beside it."""
    path = folder.with_suffix(".tar.gz")
    with tarfile.open(path, "w:gz") as archive:
        archive.add(folder, folder.name)
    return path


# Adding


async def test_added_adapters_are_copied_and_found(catalog: Catalog, disk: DiskTier, tmp_path: Path) -> None:
    source = write_lora(tmp_path / "ada")
    (source / "README.md").write_text("not part of the adapter")
    before = time.time()
    added = await catalog.add("user/ada", str(source))
    assert catalog.get("user/ada") == added
    assert list(catalog.list()) == [added]
    assert added == Adapter(
        "user/ada",
        adapter_digest(source),
        str(source),
        rank=4,
        kind="lora",
        created=added.created,
        size=size_of(source),
        stamp=open_source(str(source)).stamp(),
        warnings=(NOT_PREFILL_ONLY,),
    )
    assert before <= added.created <= time.time()
    assert (added.version, added.pinned) == (1, False)
    shutil.rmtree(source)
    assert adapter_digest(disk.root / added.digest) == added.digest
    assert sorted(os.listdir(disk.root / added.digest)) == ["adapter_config.json", "adapter_model.safetensors"]
    assert kept(tmp_path) == [added.digest]


async def test_an_adapter_comes_from_a_web_server_and_tells_how_far_it_is(catalog: Catalog, tmp_path: Path) -> None:
    folder = write_lora(tmp_path / "served" / "ada")
    told: list[tuple[int, int | None]] = []
    with serve_folder(tmp_path / "served") as server:
        added = await catalog.add("ada", f"{server.url}/ada/", progress=lambda *now: told.append(now))
        assert (added.digest, added.source) == (adapter_digest(folder), f"{server.url}/ada")
        assert added.stamp != ""
    assert told == sorted(told)
    assert told[-1] == (size_of(folder), size_of(folder))
    with (
        serve_folder(tmp_path / "served", Faults(cut_after=100)) as server,
        pytest.raises(Unavailable, match="can't be read"),
    ):
        await catalog.add("bob", f"{server.url}/ada")
    assert catalog.get("bob") is None
    with pytest.raises(SourceNotFound):
        await catalog.add("bob", str(tmp_path / "nowhere"))


async def test_adapters_that_may_be_for_all_tokens_are_warned_of(
    catalog: Catalog, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert not (await catalog.add("ada", str(write_lora(tmp_path / "ada")))).prefill_only
    assert "adapter 'ada': its configuration doesn't say" in caplog.text
    caplog.clear()
    marked = write_lora(tmp_path / "bob", lora_config(prefill_only=True))
    assert (await catalog.add("bob", str(marked))).prefill_only
    assert caplog.text == ""


async def test_what_a_folder_says_of_text_is_warned_of(
    catalog: Catalog, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_lora(tmp_path / "ada", lora_config(prefill_only=True))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert (await catalog.add("ada", str(folder))).warnings == (OTHER_TEMPLATE,)
    assert f"adapter 'ada': {OTHER_TEMPLATE}" in caplog.text
    plain = write_lora(tmp_path / "bob", lora_config(prefill_only=True))
    assert (await catalog.add("bob", str(plain))).warnings == ()


async def test_equal_content_is_one_version(catalog: Catalog, tmp_path: Path) -> None:
    one, two, three = (write_lora(tmp_path / name) for name in ("one", "two", "three"))
    first = await catalog.add("ada", str(one))
    assert await catalog.add("ada", str(one)) == first
    again = await catalog.add("ada", str(two))  # the newest source counts
    assert again == dataclasses.replace(first, source=str(two), stamp=open_source(str(two)).stamp())
    assert await catalog.add("ada", str(two), replace=True) == again
    assert again.version == 1
    other = await catalog.add("bob", str(three))
    assert other.digest == first.digest
    assert kept(tmp_path) == [first.digest]


async def test_equal_content_again_changes_nothing_for_anybody(
    catalog: Catalog, store: StateStore, tmp_path: Path
) -> None:
    source = str(write_lora(tmp_path / "one"))
    await catalog.add("ada", source)
    listed, revision = catalog.list(), (await store.adapter_changes(0)).revision
    await catalog.add("ada", source, replace=True)
    assert catalog.list() is listed
    assert (await store.adapter_changes(0)).revision == revision


async def test_adding_again_reads_what_it_must_and_writes_nothing(
    catalog: Catalog, disk: DiskTier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = [0]
    read_file = LocalFolder.read

    def counting(self: LocalFolder, name: str) -> Iterator[bytes]:
        for chunk in read_file(self, name):
            read[0] += len(chunk) * (name in LORA_FILES)
            yield chunk

    def changes() -> bytes:
        return (disk.root / LOCK).read_bytes()

    monkeypatch.setattr(LocalFolder, "read", counting)
    folder = write_lora(tmp_path / "ada")
    size = size_of(folder)

    async def add(source: Path, replace: bool = False) -> tuple[int, bool]:
        """Bytes read from the source, and whether the disk tier has changed."""
        before, read[0] = changes(), 0
        added = await catalog.add("ada", str(source), replace=replace)
        assert (added.digest, added.source) == (adapter_digest(source), str(source))
        assert added == catalog.get("ada")
        assert adapter_digest(disk.root / added.digest) == added.digest
        return read[0], changes() != before

    assert await add(folder) == (size, True)
    assert await add(folder) == (0, False)
    os.utime(folder / LORA_FILES[1])
    assert await add(folder) == (size, False)
    assert await add(folder) == (0, False)
    assert await add(Path(shutil.copytree(folder, tmp_path / "moved"))) == (size, False)
    disk.discard(adapter_digest(folder))
    assert await add(folder) == (size, True)

    content = (folder / LORA_FILES[1]).read_bytes()
    (folder / LORA_FILES[1]).write_bytes(content[:-4] + bytes(4))
    assert await add(folder, replace=True) == (2 * size, True)  # they differ at the end alone
    (folder / LORA_FILES[0]).write_bytes((folder / LORA_FILES[0]).read_bytes() + b" ")
    assert await add(folder, replace=True) == (size_of(folder), True)  # their sizes differ


async def test_uploading_again_writes_no_second_copy(catalog: Catalog, disk: DiskTier, tmp_path: Path) -> None:
    archive = tar_of(write_lora(tmp_path / "ada"))
    first = await catalog.add_archive("ada", archive)
    before = (disk.root / LOCK).read_bytes()
    again = await catalog.add_archive("ada", archive)
    assert (again.digest, again.version) == (first.digest, 1)
    assert uploads(tmp_path) == [Path(again.source)]
    assert (disk.root / LOCK).read_bytes() == before


async def test_a_taken_name_moves_only_when_told(catalog: Catalog, disk: DiskTier, tmp_path: Path) -> None:
    one, two = (str(write_lora(tmp_path / name, seed=seed)) for seed, name in enumerate(("one", "two")))
    first = await catalog.add("ada", one)
    with pytest.raises(AdapterExists, match="'ada' exists with other content"):
        await catalog.add("ada", two)
    assert catalog.get("ada") == first
    second = await catalog.add("ada", two, replace=True)
    assert second.digest != first.digest
    assert (first.version, second.version) == (1, 2)
    assert catalog.get("ada") == second
    assert adapter_digest(disk.root / first.digest) == first.digest  # running requests finish on it
    assert (await catalog.add("ada", one, replace=True)).version == 3
    await catalog.remove("ada")
    assert (await catalog.add("ada", one)).version == 1


async def test_a_refused_replacement_changes_nothing(catalog: Catalog, tmp_path: Path) -> None:
    first = await catalog.add("ada", str(write_lora(tmp_path / "one")))
    with pytest.raises(InvalidAdapter, match="rank 4"):
        await catalog.add("ada", str(write_lora(tmp_path / "two", lora_config(r=5))), replace=True)
    assert catalog.get("ada") == first
    assert kept(tmp_path) == [first.digest]


async def test_the_config_is_part_of_the_content(tmp_path: Path) -> None:
    one, two = write_lora(tmp_path / "one"), write_lora(tmp_path / "two", lora_config(lora_alpha=1))
    assert adapter_digest(one) != adapter_digest(two)


async def test_bytes_can_not_move_from_one_file_to_the_other(tmp_path: Path) -> None:
    digests = []
    for config, weights in ((b"ab", b"c"), (b"a", b"bc")):
        folder = tmp_path / config.decode()
        folder.mkdir()
        (folder / "adapter_config.json").write_bytes(config)
        (folder / "adapter_model.safetensors").write_bytes(weights)
        digests.append(adapter_digest(folder))
    assert digests[0] != digests[1]


async def test_a_removed_name_is_gone(catalog: Catalog, tmp_path: Path) -> None:
    source = write_lora(tmp_path / "one")
    added = await catalog.add("ada", str(source))
    assert await catalog.remove("ada") == added
    assert catalog.get("ada") is None
    assert list(catalog.list()) == []
    assert source.exists()  # the user's own
    with pytest.raises(ModelNotFound, match="'ada'"):
        await catalog.remove("ada")


@pytest.mark.parametrize("name", ["", "a@1", "..", "a/../b", "a" * 129, "a\n", "--help"])
async def test_a_bad_name_is_refused(catalog: Catalog, tmp_path: Path, name: str) -> None:
    for add in (catalog.add(name, str(tmp_path)), catalog.add_archive(name, tmp_path)):
        with pytest.raises(InvalidAdapter, match="can't name an adapter"):
            await add


async def test_a_name_is_found_however_unicode_writes_it(catalog: Catalog, tmp_path: Path) -> None:
    one, other = "org/Müller Söhne:5", unicodedata.normalize("NFD", "org/Müller Söhne:5")
    source = str(write_lora(tmp_path / "one"))
    added = await catalog.add(other, source)
    assert added.name == one
    assert await catalog.add(one, source) == added
    assert catalog.get(other) == catalog.get(one) == added
    assert (await catalog.pin(other, True)).pinned
    assert (await catalog.remove(other)).name == one


@pytest.mark.parametrize("name", ["..", "a//b", "/", "-x", "a/"])
async def test_names_of_an_older_rule_are_served_and_can_be_removed(
    catalog: Catalog, tmp_path: Path, name: str
) -> None:
    entry = Adapter(name, "d" * 64, str(tmp_path), rank=8)
    assert await catalog._store.put_adapter(entry, expect=None)
    await catalog.refresh()
    assert catalog.get(name) == entry
    assert await catalog.remove(name) == entry
    assert catalog.get(name) is None


async def test_the_base_models_name_is_taken(catalog: Catalog, tmp_path: Path) -> None:
    with pytest.raises(InvalidAdapter, match="is the base model's name"):
        await catalog.add("base", str(tmp_path))


# Tenants


async def test_tenants_have_equal_names_with_contents_of_their_own(catalog: Catalog, tmp_path: Path) -> None:
    names = ("ada", "@acme/ada", "@other/ada")
    archives = [tar_of(write_lora(tmp_path / f"{seed}", seed=seed)) for seed in range(3)]
    added = [await catalog.add_archive(name, archive) for name, archive in zip(names, archives, strict=True)]
    assert len({adapter.digest for adapter in added}) == 3
    assert [adapter.name for adapter in catalog.list()] == sorted(names)
    replaced = await catalog.add_archive("@acme/ada", archives[0], replace=True)
    assert (replaced.version, replaced.digest) == (2, added[0].digest)
    assert await catalog.remove("@acme/ada") == replaced
    assert [catalog.get(name) for name in names] == [added[0], None, added[2]]
    with pytest.raises(InvalidAdapter, match="is the base model's name"):
        await catalog.add("@acme/base", str(tmp_path))


async def test_tenants_may_read_only_what_is_meant_for_all(catalog: Catalog, tmp_path: Path) -> None:
    """Not what the operator's own adapters come from, nor other tenants' uploads."""
    mine, allowed = write_lora(tmp_path / "mine"), write_lora(tmp_path / "public" / "one", seed=1)
    shared = await catalog.add("shared", str(mine))
    upload = await catalog.add_archive("@other/ada", tar_of(mine))
    for source in (shared.source, upload.source):
        with pytest.raises(InvalidAdapter, match="adapter_sources"):
            await catalog.add("@acme/ada", source)
    rules = SourceLimits(5.0, rules=SourceRules((str(tmp_path / "public"),)))
    catalog._limits = dataclasses.replace(LIMITS, tenant_sources=rules)
    assert (await catalog.add("@acme/ada", str(allowed))).source == str(allowed)


async def test_the_bytes_of_a_tenant_are_limited(catalog: Catalog, tmp_path: Path) -> None:
    archives = [tar_of(write_lora(tmp_path / f"{seed}", seed=seed)) for seed in range(4)]
    size = size_of(tmp_path / "0")
    for name in ("ada", "@other/a", "@other/b"):
        await catalog.add_archive(name, archives[0])
    most = 2 * size
    await catalog.add_archive("@acme/a", archives[0], tenant_bytes=most)
    await catalog.add_archive("@acme/b", archives[1], tenant_bytes=most)
    before = uploads(tmp_path)
    with pytest.raises(TooManyBytes, match=f"'acme' would have {3 * size} bytes, more than the {most}"):
        await catalog.add_archive("@acme/c", archives[2], tenant_bytes=most)
    assert (catalog.get("@acme/c"), uploads(tmp_path)) == (None, before)
    assert (await catalog.add_archive("@acme/b", archives[3], replace=True, tenant_bytes=most)).version == 2
    assert (await catalog.add_archive("@acme/b", archives[3], tenant_bytes=size)).version == 2  # it doesn't grow
    await catalog.remove("@acme/a")
    await catalog.add_archive("@acme/c", archives[2], tenant_bytes=most)


async def test_two_gateways_dont_exceed_a_tenants_bytes_together(
    catalog: Catalog, store: StateStore, disk: DiskTier, base: BaseModel, tmp_path: Path
) -> None:
    """Both see room and add at once: one entry at most stays."""
    other = Catalog(store, disk, tmp_path / "uploads", base, "base", LIMITS)
    archives = [tar_of(write_lora(tmp_path / f"{seed}", seed=seed)) for seed in range(2)]
    size = size_of(tmp_path / "0")
    await catalog.add_archive("@acme/old", archives[0])
    for one in (catalog, other):
        await one.refresh()
    tries = (
        catalog.add_archive("@acme/a", archives[0], tenant_bytes=2 * size),
        other.add_archive("@acme/b", archives[1], tenant_bytes=2 * size),
        other.add_archive("@acme/old", archives[1], replace=True, tenant_bytes=2 * size),
    )
    ended = await asyncio.gather(*tries, return_exceptions=True)
    assert all(isinstance(end, Adapter | TooManyBytes) for end in ended)
    await catalog.refresh()
    assert sum(adapter.size for adapter in catalog.list()) <= 2 * size
    assert catalog.get("@acme/old") is not None


async def test_text_that_is_not_unicode_is_refused_in_words(catalog: Catalog, tmp_path: Path) -> None:
    """Lone surrogates, which no store and no reply can hold: in a name, in a source, and in an adapter's metadata."""
    good = write_lora(tmp_path / "good")
    by_key = write_lora(tmp_path / "key", {**lora_config(), "\ud800": 1})
    by_value = write_lora(tmp_path / "value", lora_config(peft_type="\udfff"))
    for name, source in (("ada\ud800", good), ("ada", f"{good}\udc80"), ("ada", by_key), ("ada", by_value)):
        with pytest.raises(InvalidAdapter) as refused:
            await catalog.add(name, str(source))
        assert r"\ud" in str(refused.value)
        assert str(refused.value).encode()
    assert catalog.list() == ()


async def test_a_refused_folder_leaves_nothing(catalog: Catalog, tmp_path: Path) -> None:
    source = write_lora(tmp_path / "a", lora_config(r=5))
    with pytest.raises(InvalidAdapter, match="rank 4"):
        await catalog.add("ada", str(source))
    assert kept(tmp_path) == []
    assert catalog.get("ada") is None


async def test_links_are_followed(catalog: Catalog, disk: DiskTier, tmp_path: Path) -> None:
    source = write_lora(tmp_path / "real")
    linked = tmp_path / "linked"
    linked.mkdir()
    for file in source.iterdir():
        (linked / file.name).symlink_to(file)
    (tmp_path / "folder-link").symlink_to(linked)
    added = await catalog.add("ada", str(tmp_path / "folder-link"))
    assert not any(file.is_symlink() for file in os.scandir(disk.root / added.digest))


async def test_an_adapter_over_the_limit_is_refused(catalog: Catalog, tmp_path: Path) -> None:
    large = write_lora(tmp_path / "a", lora_config(junk="x" * LIMITS.max_adapter_bytes))
    with pytest.raises(InvalidAdapter, match=r"the limit of store\.max_adapter_bytes"):
        await catalog.add("ada", str(large))
    assert kept(tmp_path) == []


async def test_a_missing_disk_is_unavailable(catalog: Catalog, disk: DiskTier, tmp_path: Path) -> None:
    shutil.rmtree(disk.root)
    disk.root.write_text("no folder")
    with pytest.raises(Unavailable, match="adapters can't be kept on the server's disk"):
        await catalog.add("ada", str(write_lora(tmp_path / "a")))
    (tmp_path / "uploads").write_text("no folder")
    with pytest.raises(Unavailable, match="the archive can't be kept on the server's disk"):
        await catalog.add_archive("ada", tar_of(tmp_path / "a"))


# Archives


async def test_an_archive_is_kept_as_the_adapters_source(catalog: Catalog, disk: DiskTier, tmp_path: Path) -> None:
    folder = write_lora(tmp_path / "ada")
    archive = tar_of(folder)
    added = await catalog.add_archive("ada", archive)
    archive.unlink()
    (upload,) = uploads(tmp_path)
    assert added.source == str(upload)
    assert added.digest == adapter_digest(folder) == adapter_digest(upload)
    disk.discard(added.digest)
    assert disk.fetch(open_source(added.source), lambda copy: None, digest=added.digest)
    assert await catalog.remove("ada") == added
    assert uploads(tmp_path) == []


async def test_an_upload_goes_when_its_name_points_elsewhere(catalog: Catalog, tmp_path: Path) -> None:
    one, two = (write_lora(tmp_path / name, seed=seed) for seed, name in enumerate(("one", "two")))
    await catalog.add_archive("ada", tar_of(one))
    second = await catalog.add_archive("ada", tar_of(two), replace=True)
    assert uploads(tmp_path) == [Path(second.source)]
    again = await catalog.add_archive("ada", tar_of(two))
    assert again == dataclasses.replace(second, source=again.source, stamp=again.stamp)
    assert uploads(tmp_path) == [Path(again.source)]
    local = await catalog.add("ada", str(two))
    assert local.digest == second.digest
    assert uploads(tmp_path) == []


async def test_equal_uploads_of_two_names_are_no_business_of_each_other(catalog: Catalog, tmp_path: Path) -> None:
    archive = tar_of(write_lora(tmp_path / "one"))
    names = [str(number) for number in range(8)]
    added = await asyncio.gather(*(catalog.add_archive(name, archive) for name in names))
    assert len({entry.digest for entry in added}) == 1
    for name in names[1:]:
        await catalog.remove(name)
    assert uploads(tmp_path) == [Path(added[0].source)]
    assert adapter_digest(Path(added[0].source)) == added[0].digest
    shared = await catalog.add("shared", added[0].source)
    await catalog.remove("0")
    assert uploads(tmp_path) == [Path(shared.source)]  # another name still has it as its source
    await catalog.remove("shared")
    assert uploads(tmp_path) == []


async def test_a_refused_upload_leaves_nothing(catalog: Catalog, tmp_path: Path) -> None:
    first = await catalog.add("ada", str(write_lora(tmp_path / "one", seed=1)))
    with pytest.raises(AdapterExists):
        await catalog.add_archive("ada", tar_of(write_lora(tmp_path / "two", seed=2)))
    with pytest.raises(InvalidAdapter, match="rank 4"):
        await catalog.add_archive("bob", tar_of(write_lora(tmp_path / "three", lora_config(r=5))))
    (tmp_path / "junk.tar").write_bytes(b"junk")
    with pytest.raises(InvalidAdapter, match="no tar or zip file"):
        await catalog.add_archive("bob", tmp_path / "junk.tar")
    with tarfile.open(tmp_path / "empty.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo("README.md"), io.BytesIO())
    with pytest.raises(InvalidAdapter, match="no adapter in it"):
        await catalog.add_archive("bob", tmp_path / "empty.tar")
    assert list(catalog.list()) == [first]
    assert uploads(tmp_path) == []


# Adds that are given up


@contextlib.asynccontextmanager
async def adding(adds: Sequence[Coroutine[Any, Any, Adapter]]) -> AsyncIterator[list[asyncio.Task[Adapter]]]:
    """The adds under way. They are cancelled at the end, which is soon."""
    tasks = [asyncio.create_task(add) for add in adds]
    try:
        yield tasks
    finally:
        for task in tasks:
            task.cancel()
        async with asyncio.timeout(5):
            results = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(result, asyncio.CancelledError) for result in results)


@pytest.mark.parametrize("faults", [Faults(stall=True), Faults(stall_after=100)], ids=["no answer", "half"])
async def test_slow_sources_keep_nobody_else_waiting_and_can_be_given_up(
    store: StateStore, disk: DiskTier, base: BaseModel, tmp_path: Path, faults: Faults
) -> None:
    catalog = Catalog(
        store, disk, tmp_path / "uploads", base, "base", dataclasses.replace(LIMITS, sources=SourceLimits(30.0))
    )
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(2))
    write_lora(tmp_path / "served" / "ada")
    with serve_folder(tmp_path / "served", faults) as server:
        async with adding([catalog.add(str(number), f"{server.url}/ada") for number in range(4)]):
            await until(lambda: len(server.requests) >= 8 if faults.stall else len(kept(tmp_path)) == 4)
            await asyncio.wait_for(asyncio.to_thread(int), 5)
            await catalog.add("local", str(write_lora(tmp_path / "local")))
    assert [entry.name for entry in catalog.list()] == ["local"]
    assert kept(tmp_path) == [catalog.list()[0].digest]


async def test_an_add_that_waits_for_its_turn_can_be_given_up(
    store: StateStore, disk: DiskTier, base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("preft.adapters.sources.fetch_threads.PER_PLACE", 1)
    catalog = Catalog(
        store, disk, tmp_path / "uploads", base, "base", dataclasses.replace(LIMITS, sources=SourceLimits(30.0))
    )
    write_lora(tmp_path / "served" / "ada")
    with serve_folder(tmp_path / "served", Faults(stall_after=100)) as server:
        local = str(write_lora(tmp_path / "local"))
        async with adding([catalog.add("ada", f"{server.url}/ada")]):
            await until(lambda: len(kept(tmp_path)) == 1)
            async with adding([catalog.add("bob", f"{server.url}/bob")]) as (waiting,):
                await asyncio.wait({waiting}, timeout=0.1)
        assert kept(tmp_path) == []
        await catalog.add("carol", local)
    assert [entry.name for entry in catalog.list()] == ["carol"]


async def test_an_upload_that_is_given_up_leaves_nothing(
    catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unpacked = threading.Event()

    def unpack(archive: Path, target: Path, max_bytes: int, stop: threading.Event) -> None:
        unpack_archive(archive, target, max_bytes, stop)
        unpacked.set()
        assert stop.wait(5)  # too late: it is all there

    monkeypatch.setattr("preft.adapters.catalog.adapter_catalog.unpack_archive", unpack)
    async with adding([catalog.add_archive("ada", tar_of(write_lora(tmp_path / "ada")))]):
        await until(unpacked.is_set)
    assert uploads(tmp_path) == []
    assert (list(catalog.list()), kept(tmp_path)) == ([], [])


# Pinning


async def test_a_pinned_adapter_stays_pinned_when_it_is_replaced(
    catalog: Catalog, disk: DiskTier, tmp_path: Path
) -> None:
    one, two = (str(write_lora(tmp_path / name, seed=seed)) for seed, name in enumerate(("one", "two")))
    first = await catalog.add("ada", one)
    pinned = await catalog.pin("ada", True)
    assert pinned == dataclasses.replace(first, pinned=True)
    assert catalog.get("ada") == pinned
    assert catalog.pinned == disk.pinned == {first.digest}
    assert await catalog.pin("ada", True) == pinned
    assert await catalog.add("ada", one, replace=True) == pinned
    second = await catalog.add("ada", two, replace=True)
    assert (second.pinned, second.version) == (True, 2)
    assert catalog.pinned == disk.pinned == {second.digest}
    await catalog.pin("ada", False)
    assert catalog.pinned == disk.pinned == set()
    with pytest.raises(ModelNotFound, match="'bob'"):
        await catalog.pin("bob", True)


async def test_a_pinned_adapter_is_not_evicted_from_disk(store: StateStore, base: BaseModel, tmp_path: Path) -> None:
    sources = [write_lora(tmp_path / str(number), seed=number) for number in range(6)]
    disk = DiskTier(tmp_path / "kept", 2 * size_of(sources[0]) + 10, 100_000)
    catalog = Catalog(store, disk, tmp_path / "uploads", base, "base", LIMITS)
    added = [await catalog.add("0", str(sources[0]))]
    await catalog.pin("0", True)
    added += [await catalog.add(source.name, str(source)) for source in sources[1:]]
    assert kept(tmp_path) == sorted((added[0].digest, added[5].digest))
    assert len(catalog.list()) == 6  # names outlive their copies


async def test_pinning_has_a_limit(store: StateStore, disk: DiskTier, base: BaseModel, tmp_path: Path) -> None:
    sources = [write_lora(tmp_path / str(number), seed=number) for number in range(4)]
    same = write_lora(tmp_path / "same", seed=0)
    limits = dataclasses.replace(LIMITS, pinned_bytes=2 * size_of(sources[0]) + 10)
    catalog = Catalog(store, disk, tmp_path / "uploads", base, "base", limits)
    for source in (*sources, same):
        await catalog.add(source.name, str(source))
    results = await asyncio.gather(*(catalog.pin(source.name, True) for source in sources), return_exceptions=True)
    refused = [result for result in results if isinstance(result, InvalidRequest)]
    assert len(refused) == 2
    assert f"more than the {limits.pinned_bytes} that may be pinned: unpin another" in str(refused[0])
    assert refused[0].param == "pinned"
    pinned = [entry.name for entry in catalog.list() if entry.pinned]
    assert len(pinned) == 2
    if "0" in pinned:
        await catalog.pin("same", True)  # equal content takes no more room
        await catalog.pin("same", False)
    large = write_lora(tmp_path / "large", lora_config(8), lora_tensors(8))
    before = catalog.get(pinned[0])
    with pytest.raises(InvalidRequest, match="that may be pinned"):
        await catalog.add(pinned[0], str(large), replace=True)
    assert catalog.get(pinned[0]) == before
    await catalog.pin(pinned[1], False)
    assert (await catalog.add(pinned[0], str(large), replace=True)).pinned


# Several processes


async def test_two_catalogs_agree(catalog: Catalog, disk: DiskTier, base: BaseModel, tmp_path: Path) -> None:
    store = open_store(tmp_path / "state.sqlite")
    other = Catalog(store, disk, tmp_path / "uploads", base, "base", LIMITS)
    sources = [str(write_lora(tmp_path / f"s{i}", seed=i)) for i in range(6)]
    adds = (who.add("ada", source) for source in sources for who in (catalog, other))
    results = await asyncio.gather(*adds, return_exceptions=True)
    winners = {result.digest for result in results if not isinstance(result, BaseException)}
    assert len(winners) == 1
    assert all(isinstance(result, AdapterExists) for result in results if isinstance(result, BaseException))
    await catalog.refresh()
    await other.refresh()
    assert catalog.list() == other.list()
    await other.remove("ada")
    assert catalog.get("ada") is not None  # a watched copy: not yet
    await catalog.refresh()
    assert catalog.get("ada") is None
    await store.close()


async def test_versions_count_all_replacements_of_two_catalogs(
    catalog: Catalog, disk: DiskTier, base: BaseModel, tmp_path: Path
) -> None:
    store = open_store(tmp_path / "state.sqlite")
    other = Catalog(store, disk, tmp_path / "uploads", base, "base", LIMITS)
    sources = [str(write_lora(tmp_path / f"s{i}", seed=i)) for i in range(6)]
    adds = ((catalog, other)[i % 2].add("ada", source, replace=True) for i, source in enumerate(sources))
    results = await asyncio.gather(*adds)
    assert sorted(result.version for result in results) == [1, 2, 3, 4, 5, 6]
    await store.close()


class RacingStore(SqliteStore):
    """Two writers' first reads of an entry end together: neither writes before both have read."""

    def __init__(self, path: Path, both_read: asyncio.Barrier) -> None:
        super().__init__(path)
        self._both_read: asyncio.Barrier | None = both_read

    async def adapter(self, name: str) -> Adapter | None:
        entry = await super().adapter(name)
        barrier, self._both_read = self._both_read, None
        if barrier is not None:
            await barrier.wait()
        return entry


@contextlib.asynccontextmanager
async def racing_catalogs(tmp_path: Path, disk: DiskTier, base: BaseModel) -> AsyncIterator[list[Catalog]]:
    """Two catalogs over one file. The next write of each meets the other's."""
    barrier = asyncio.Barrier(2)
    stores = [RacingStore(tmp_path / "state.sqlite", barrier) for _ in range(2)]
    yield [Catalog(store, disk, tmp_path / "uploads", base, "base", LIMITS) for store in stores]
    for store in stores:
        await store.close()


async def test_two_writers_that_read_the_same_entry_both_count(
    catalog: Catalog, disk: DiskTier, base: BaseModel, tmp_path: Path
) -> None:
    sources = [str(write_lora(tmp_path / f"s{i}", seed=i)) for i in range(3)]
    await catalog.add("ada", sources[0])
    async with racing_catalogs(tmp_path, disk, base) as writers:
        adds = (writer.add("ada", source, replace=True) for writer, source in zip(writers, sources[1:], strict=True))
        results = await asyncio.wait_for(asyncio.gather(*adds), 20)
    await catalog.refresh()
    assert sorted(result.version for result in results) == [2, 3]
    assert catalog.get("ada") == max(results, key=lambda result: result.version)


async def test_two_writers_that_find_a_name_free_do_not_both_get_it(
    disk: DiskTier, base: BaseModel, tmp_path: Path
) -> None:
    sources = [str(write_lora(tmp_path / f"s{i}", seed=i)) for i in range(2)]
    async with racing_catalogs(tmp_path, disk, base) as writers:
        adds = (writer.add("ada", source) for writer, source in zip(writers, sources, strict=True))
        results = await asyncio.wait_for(asyncio.gather(*adds, return_exceptions=True), 20)
    assert {type(result) for result in results} == {Adapter, AdapterExists}


async def test_a_pin_and_a_replacement_at_once_are_both_kept(
    catalog: Catalog, disk: DiskTier, base: BaseModel, tmp_path: Path
) -> None:
    sources = [str(write_lora(tmp_path / f"s{i}", seed=i)) for i in range(2)]
    await catalog.add("ada", sources[0])
    async with racing_catalogs(tmp_path, disk, base) as (one, other):
        changes = one.pin("ada", True), other.add("ada", sources[1], replace=True)
        _, added = await asyncio.wait_for(asyncio.gather(*changes), 20)
    await catalog.refresh()
    assert catalog.get("ada") == dataclasses.replace(added, pinned=True)


async def test_a_view_follows_what_changes(catalog: Catalog, tmp_path: Path) -> None:
    store = open_store(tmp_path / "state.sqlite")
    view = CatalogView(store)
    one, two = (str(write_lora(tmp_path / name, seed=seed)) for seed, name in enumerate(("one", "two")))
    first = await catalog.add("ada", one)
    await catalog.add("bob", one)
    assert await view.refresh() == set()
    assert view.list() == catalog.list()
    listed = view.list()
    assert not await view.refresh()
    assert view.list() is listed
    second = await catalog.add("ada", two, replace=True)
    assert await view.refresh() == set()  # bob has it still
    assert view.list() is not listed
    await catalog.pin("ada", True)
    assert not await view.refresh()
    assert view.pinned == {second.digest}
    await catalog.remove("bob")
    assert await view.refresh() == {first.digest}
    await catalog.remove("ada")
    await catalog.add("ada", one)
    assert await view.refresh() == {second.digest}
    assert view.pinned == set()
    assert view.list() == catalog.list()
    late = CatalogView(store)
    assert not await late.refresh()
    assert late.list() == view.list()
    await store.close()


async def test_content_that_moves_to_another_name_is_not_left(catalog: Catalog, tmp_path: Path) -> None:
    store = open_store(tmp_path / "state.sqlite")
    view = CatalogView(store)
    one = str(write_lora(tmp_path / "one"))
    await catalog.add("ada", one)
    await view.refresh()
    await catalog.remove("ada")
    await catalog.add("bob", one)
    assert await view.refresh() == set()
    await store.close()


async def test_a_copy_that_was_not_refreshed_for_long_misses_no_removal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store has forgotten the removal, and tells the whole catalog instead."""
    monkeypatch.setattr(sqlite, "KEPT_REMOVALS", 2)
    store = SqliteStore(tmp_path / "state.sqlite")
    view = CatalogView(store)
    entries = [Adapter(name, f"{number:064x}", "/adapters", 8) for number, name in enumerate(("gone", "kept", *"abc"))]
    for entry in entries[:2]:
        await store.put_adapter(entry, expect=None)
    await view.refresh()
    for entry in (entries[0], *entries[2:]):
        await store.put_adapter(entry, expect=entries[0] if entry is entries[0] else None)
        await store.delete_adapter(entry.name)
    assert await view.refresh() == {entries[0].digest}
    assert (view.get("gone"), list(view.list())) == (None, [entries[1]])
    await store.close()


class CountingStore(SqliteStore):
    """Counts the entries that were read to follow the catalog."""

    read = 0

    async def adapter_changes(self, since: int) -> AdapterChanges:
        changes = await super().adapter_changes(since)
        self.read += len(changes.put)
        return changes


async def test_thousands_of_names_are_added_at_one_pace(tmp_path: Path) -> None:
    """Through the store alone: what grows with the catalog is what a refresh does."""
    store = CountingStore(tmp_path / "state.sqlite")
    view = CatalogView(store)
    times = []
    for number in range(2000):
        adapter = Adapter(f"user/{number}", f"{number:064x}", f"/adapters/{number}", 8, size=1000, pinned=number < 5)
        started = time.process_time()
        assert await store.put_adapter(adapter, expect=None)
        assert not await view.refresh()
        times.append(time.process_time() - started)
    assert store.read == len(view.list()) == 2000
    assert len(view.pinned) == 5
    first, last = sorted(times[:500])[250], sorted(times[-500:])[250]
    assert last < 5 * first + 0.002
    await store.close()


async def test_watching_survives_a_store_that_fails(
    catalog: Catalog, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    added = await catalog.add("ada", str(write_lora(tmp_path / "a")))
    changed = asyncio.Event()
    left: list[str] = []

    async def follow() -> None:
        if found := await catalog.refresh():
            left.extend(found)
            changed.set()

    background = Background()
    with contextlib.closing(sqlite3.connect(tmp_path / "state.sqlite", isolation_level=None)) as db:
        db.execute("ALTER TABLE adapters RENAME TO hidden")
        background.every(0.005, follow, "the catalog is not up to date")
        async with asyncio.timeout(5):
            while "the catalog is not up to date" not in caplog.text:
                await asyncio.sleep(0.001)
        assert catalog.get("ada") == added
        assert not changed.is_set()
        with pytest.raises(Unavailable):
            await catalog.refresh()
        db.execute("ALTER TABLE hidden RENAME TO adapters")
    other = open_store(tmp_path / "state.sqlite")
    await other.delete_adapter("ada")
    await asyncio.wait_for(changed.wait(), 5)
    assert catalog.get("ada") is None
    assert left == [added.digest]
    assert caplog.text.count("the catalog is not up to date") == 1
    await background.close()
    await other.close()


async def test_a_copy_that_is_too_old_says_so(
    store: StateStore, disk: DiskTier, base: BaseModel, tmp_path: Path
) -> None:
    """A name may point elsewhere by then, or nowhere."""
    limits = dataclasses.replace(LIMITS, max_age=0.05)
    catalog = Catalog(store, disk, tmp_path / "uploads", base, "base", limits)
    added = await catalog.add("ada", str(write_lora(tmp_path / "a")))
    await catalog.refresh()
    assert catalog.get("ada") == added
    await asyncio.sleep(0.1)
    for read in (catalog.list, lambda: catalog.get("ada"), lambda: catalog.get("bob")):
        with pytest.raises(Unavailable, match="catalog could not be read for 0 seconds"):
            read()
    await catalog.refresh()
    assert catalog.get("ada") == added


# The base model


def test_a_sharded_base_model_is_read(tmp_path: Path) -> None:
    folder = write_base(tmp_path / "base")
    whole = read_base_model(folder)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00001.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    sharded = read_base_model(folder)
    assert sharded.modules == whole.modules
    assert {path.name for path, _ in sharded.embeddings.values()} == {"model-00001-of-00001.safetensors"}
    assert len(whole.modules) == 15
    assert whole.modules["lm_head"] == whole.embeddings["lm_head"][1].shape == (32, 16)
    assert whole.modules["model.layers.1.mlp.down_proj"] == (16, 24)


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_a_base_model_without_its_files_is_a_config_error(tmp_path: Path, missing: str) -> None:
    folder = write_base(tmp_path / "base")
    (folder / missing).unlink()
    with pytest.raises(ConfigError, match=missing.replace(".", r"\.")):
        read_base_model(folder)
