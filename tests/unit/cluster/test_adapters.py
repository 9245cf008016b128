"""The catalog as a gateway opens it, and as a worker follows it."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

import pytest

from preft.adapters.digest import adapter_digest
from preft.cluster.adapters import following_catalog, open_catalog, open_disk_tier, uploads_folder
from preft.core.cluster import Role, Tier
from preft.core.errors import ConfigError
from preft.core.request import AdapterRef
from preft.core.settings import MiB, Settings, load_settings
from preft.transfer.staging import StagingArena
from support.adapter_tiers import adapter_store
from support.fake_engine import FakeEngine
from support.lora_folders import write_base, write_lora
from support.worker_services import until


def settings_in(folder: Path, **changes: object) -> Settings:
    model = folder / "model"
    if not model.exists():
        write_base(model)
    return load_settings(None, {"model": str(model), "state_dir": str(folder / "state"), **changes})


async def test_configured_adapters_and_a_watched_folder_are_there(tmp_path: Path) -> None:
    write_lora(tmp_path / "ada")
    write_lora(tmp_path / "many" / "bob", seed=2)
    own = settings_in(tmp_path, adapters={"ada": str(tmp_path / "ada")}, adapter_dir=str(tmp_path / "many"))
    async with open_catalog(own) as catalog:
        assert catalog.get("ada") is not None
        await until(lambda: catalog.get("bob") is not None)
    async with open_catalog(settings_in(tmp_path)) as again:
        assert [adapter.name for adapter in again.list()] == ["ada", "bob"]


async def test_a_base_model_that_takes_an_adapters_name_is_refused(tmp_path: Path) -> None:
    """It would answer the requests for the adapter."""
    async with open_catalog(settings_in(tmp_path)) as catalog:
        await catalog.add("ada", str(write_lora(tmp_path / "ada")))
    with pytest.raises(ConfigError, match=r"^served_model_name: 'ada' is the name of an adapter"):
        async with open_catalog(settings_in(tmp_path, served_model_name="ada")):
            pass


async def test_leftovers_of_uploads_go_after_a_day(tmp_path: Path) -> None:
    uploads = uploads_folder(settings_in(tmp_path))
    for name in (".unfinished-1", "upload-2", ".unfinished-3", "kept-4"):
        (uploads / name).mkdir(parents=True)
    for name in (".unfinished-1", "upload-2", "kept-4"):
        os.utime(uploads / name, (0, time.time() - 90_000))
    async with open_catalog(settings_in(tmp_path)):
        assert sorted(entry.name for entry in uploads.iterdir()) == [".unfinished-3", "kept-4"]


async def test_uploads_that_the_catalog_does_not_name_go_after_a_day(tmp_path: Path) -> None:
    """Their process was killed before it wrote the entry, or before it removed what an entry had named."""
    uploads = uploads_folder(settings_in(tmp_path))
    own, killed, fresh = (str(number) * 32 for number in range(3))
    async with open_catalog(settings_in(tmp_path)) as catalog:
        await catalog.add("bob", str(write_lora(uploads / own)))
    for name in (own, killed, fresh):
        (uploads / name).mkdir(parents=True, exist_ok=True)
        os.utime(uploads / name, (0, time.time() - (3600 if name == fresh else 90_000)))
    async with open_catalog(settings_in(tmp_path)):
        assert sorted(entry.name for entry in uploads.iterdir()) == [own, fresh]


async def test_another_base_models_uploads_are_none_of_ours(tmp_path: Path) -> None:
    """Its catalog may be in a store that this process knows nothing of."""
    upload = tmp_path / "state" / "models" / "another" / "uploads" / ("0" * 32)
    upload.mkdir(parents=True)
    os.utime(upload, (0, 0))
    async with open_catalog(settings_in(tmp_path)):
        assert upload.is_dir()


async def test_a_worker_learns_of_pins_and_of_what_has_left(tmp_path: Path) -> None:
    own = settings_in(tmp_path, router={"poll_interval": 0.02})
    source = write_lora(tmp_path / "ada")
    reference = AdapterRef("ada", adapter_digest(source), str(source))
    memory, kv = StagingArena.create(MiB), StagingArena.create(MiB)
    engine = FakeEngine(Role.PREFILL, kv.path, memory.path)
    try:
        async with open_catalog(own) as catalog, adapter_store(engine, memory) as adapters:
            await catalog.add("ada", str(source))
            async with following_catalog(own, adapters):
                assert adapters.digests == ()
                await catalog.pin("ada", True)
                await until(lambda: adapters.digests == (reference.digest,))  # nobody has asked for it
                await catalog.pin("ada", False)
                await catalog.remove("ada")
                await until(lambda: adapters.digests == ())
                assert adapters.where(reference.digest).tier is not Tier.HOST
    finally:
        memory.close()
        kv.close()
        await engine.close()


async def test_the_disk_tier_is_the_machine_s(tmp_path: Path) -> None:
    own = settings_in(tmp_path, store={"disk_bytes": 2 * MiB})
    one, other = open_disk_tier(own), open_disk_tier(own)
    async with open_catalog(own) as catalog:
        added = await catalog.add("ada", str(write_lora(tmp_path / "ada")))
    assert one.find(added.digest) == other.find(added.digest) is not None
    assert await asyncio.to_thread(one.used) == added.size
