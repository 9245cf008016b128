"""The catalog: content decides the version, names point to it, copies are whole, several processes agree."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from preft.adapters import storage
from preft.adapters.base_model import BaseModel, read_base_model
from preft.adapters.catalog import Catalog
from preft.adapters.digest import adapter_digest
from preft.core.errors import AdapterExists, ConfigError, InvalidAdapter, ModelNotFound, Unavailable
from preft.core.ports import StateStore
from preft.state import open_store
from support.lora_folders import lora_config, write_base, write_lora


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    return read_base_model(write_base(tmp_path_factory.mktemp("base")))


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[StateStore]:
    store = open_store(tmp_path / "state.sqlite")
    yield store
    await store.close()


@pytest.fixture
def catalog(store: StateStore, base: BaseModel, tmp_path: Path) -> Catalog:
    return Catalog(store, tmp_path / "kept", base, "base", max_rank=8)


def kept(tmp_path: Path) -> list[str]:
    return sorted(entry.name for entry in (tmp_path / "kept").iterdir())


async def test_added_adapters_are_copied_and_found(catalog: Catalog, tmp_path: Path) -> None:
    source = write_lora(tmp_path / "ada")
    (source / "README.md").write_text("not part of the adapter")
    added = await catalog.add("user/ada", str(source))
    assert catalog.get("user/ada") == added
    assert list(catalog.list()) == [added]
    assert (added.name, added.rank, added.kind, added.source) == ("user/ada", 4, "lora", str(source))
    assert added.digest == adapter_digest(source)
    shutil.rmtree(source)
    assert adapter_digest(Path(added.path)) == added.digest
    assert sorted(os.listdir(added.path)) == ["adapter_config.json", "adapter_model.safetensors"]
    assert kept(tmp_path) == [added.digest]


async def test_adapters_that_may_be_for_all_tokens_are_warned_of(
    catalog: Catalog, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert not (await catalog.add("ada", str(write_lora(tmp_path / "ada")))).prefill_only
    assert "adapter 'ada': its configuration doesn't say" in caplog.text
    caplog.clear()
    marked = write_lora(tmp_path / "bob", lora_config(prefill_only=True))
    assert (await catalog.add("bob", str(marked))).prefill_only
    assert caplog.text == ""


async def test_equal_content_is_one_version(catalog: Catalog, tmp_path: Path) -> None:
    first = await catalog.add("ada", str(write_lora(tmp_path / "one")))
    again = await catalog.add("ada", str(write_lora(tmp_path / "two")))
    other = await catalog.add("bob", str(write_lora(tmp_path / "three")))
    assert again == first
    assert other.digest == first.digest
    assert kept(tmp_path) == [first.digest]


async def test_a_taken_name_moves_only_when_told(catalog: Catalog, tmp_path: Path) -> None:
    first = await catalog.add("ada", str(write_lora(tmp_path / "one", seed=1)))
    two = str(write_lora(tmp_path / "two", seed=2))
    with pytest.raises(AdapterExists, match="'ada' exists with other content"):
        await catalog.add("ada", two)
    assert catalog.get("ada") == first
    second = await catalog.add("ada", two, replace=True)
    assert second.digest != first.digest
    assert catalog.get("ada") == second
    assert adapter_digest(Path(first.path)) == first.digest  # running requests finish on it


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
    added = await catalog.add("ada", str(write_lora(tmp_path / "one")))
    assert await catalog.remove("ada") == added
    assert catalog.get("ada") is None
    with pytest.raises(ModelNotFound, match="'ada'"):
        await catalog.remove("ada")


@pytest.mark.parametrize("name", ["", "a b", "é", "a" * 129, "a\n", "a:b"])
async def test_a_bad_name_is_refused(catalog: Catalog, tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidAdapter, match="can't name an adapter"):
        await catalog.add(name, str(tmp_path))


async def test_the_base_models_name_is_taken(catalog: Catalog, tmp_path: Path) -> None:
    with pytest.raises(InvalidAdapter, match="is the base model's name"):
        await catalog.add("base", str(tmp_path))


async def test_a_refused_folder_leaves_nothing(catalog: Catalog, tmp_path: Path) -> None:
    source = write_lora(tmp_path / "a", lora_config(r=5))
    with pytest.raises(InvalidAdapter, match="rank 4"):
        await catalog.add("ada", str(source))
    assert kept(tmp_path) == []
    assert catalog.get("ada") is None


async def test_links_are_followed(catalog: Catalog, tmp_path: Path) -> None:
    source = write_lora(tmp_path / "real")
    linked = tmp_path / "linked"
    linked.mkdir()
    for file in source.iterdir():
        (linked / file.name).symlink_to(file)
    (tmp_path / "folder-link").symlink_to(linked)
    added = await catalog.add("ada", str(tmp_path / "folder-link"))
    assert not any(file.is_symlink() for file in os.scandir(added.path))


async def test_a_damaged_copy_is_replaced(catalog: Catalog, tmp_path: Path) -> None:
    source = str(write_lora(tmp_path / "a"))
    added = await catalog.add("ada", source)
    weights = Path(added.path) / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.unlink()
    weights.write_bytes(content)
    assert await catalog.add("ada", source) == added
    assert adapter_digest(Path(added.path)) == added.digest


async def test_a_copy_that_came_out_different_is_refused(
    catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "adapter_digest", lambda folder: "something else")
    with pytest.raises(Unavailable, match="came out different"):
        await catalog.add("ada", str(write_lora(tmp_path / "a")))
    assert kept(tmp_path) == []


async def test_what_a_dead_process_left_is_cleared_after_an_hour(catalog: Catalog, tmp_path: Path) -> None:
    old, young = tmp_path / "kept" / ".unfinished-1", tmp_path / "kept" / ".unfinished-2"
    for folder in (old, young):
        folder.mkdir(parents=True)
    os.utime(old, (0, time.time() - 4000))
    added = await catalog.add("ada", str(write_lora(tmp_path / "a")))
    assert kept(tmp_path) == [".unfinished-2", added.digest]


async def test_a_full_or_missing_disk_is_unavailable(store: StateStore, base: BaseModel, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    catalog = Catalog(store, tmp_path / "file" / "kept", base, "base", max_rank=8)
    with pytest.raises(Unavailable, match="adapters can't be kept in"):
        await catalog.add("ada", str(write_lora(tmp_path / "a")))


async def test_two_catalogs_agree(catalog: Catalog, base: BaseModel, tmp_path: Path) -> None:
    store = open_store(tmp_path / "state.sqlite")
    other = Catalog(store, tmp_path / "kept", base, "base", max_rank=8)
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


async def test_watching_survives_a_store_that_fails(catalog: Catalog, store: StateStore, tmp_path: Path) -> None:
    other = open_store(tmp_path / "state.sqlite")
    added = await catalog.add("ada", str(write_lora(tmp_path / "a")))
    reads, healthy = 0, store.adapters

    async def failing_at_first() -> list[object]:
        nonlocal reads
        reads += 1
        if reads <= 2:
            raise Unavailable("disk on fire")
        return list(await healthy())

    store.adapters = failing_at_first  # type: ignore[method-assign, assignment]
    watching = asyncio.create_task(catalog.watch(0.01))
    await other.delete_adapter("ada")
    while reads < 2:
        assert catalog.get("ada") == added
        await asyncio.sleep(0.01)
    for _ in range(500):
        if catalog.get("ada") is None:
            break
        await asyncio.sleep(0.01)
    assert catalog.get("ada") is None
    watching.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await watching
    await other.close()


def test_a_sharded_base_model_is_read(tmp_path: Path) -> None:
    folder = write_base(tmp_path / "base")
    whole = read_base_model(folder)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00001.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert read_base_model(folder) == whole
    assert len(whole.modules) == 14
    assert whole.modules["model.layers.1.mlp.down_proj"] == (16, 24)


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_a_base_model_without_its_files_is_a_config_error(tmp_path: Path, missing: str) -> None:
    folder = write_base(tmp_path / "base")
    (folder / missing).unlink()
    with pytest.raises(ConfigError, match=missing.replace(".", r"\.")):
        read_base_model(folder)
