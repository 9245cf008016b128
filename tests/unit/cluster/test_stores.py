"""Which stores the settings name: one for each use by default, or one that all machines share."""

from __future__ import annotations

from pathlib import Path

import pytest

from preft.cluster.model import model_identity
from preft.cluster.stores import model_folder, open_catalog_store, open_registrations
from preft.core.cluster import Adapter, Role, Worker
from preft.core.errors import ConfigError
from preft.core.settings import Settings, load_settings
from support.lora_folders import write_base
from support.redis_server import RedisServer

WORKER = Worker("w", Role.PREFILL, "h:1")
ADAPTER = Adapter("ada", "d" * 64, "/s", 8)


def settings_in(folder: Path, **changes: object) -> Settings:
    model = folder / "model"
    if not model.exists():
        write_base(model)
    return load_settings(None, {"model": str(model), "state_dir": str(folder / "state"), **changes})


async def put_both(settings: Settings) -> None:
    registrations, catalog = open_registrations(settings), open_catalog_store(settings)
    await registrations.put_worker(WORKER, 60)
    assert await catalog.put_adapter(ADAPTER, expect=None)
    await registrations.close()
    await catalog.close()


async def read_both(settings: Settings) -> tuple[list[Worker], list[Adapter]]:
    registrations, catalog = open_registrations(settings), open_catalog_store(settings)
    found = await registrations.workers(), list((await catalog.adapter_changes(0)).put)
    await registrations.close()
    await catalog.close()
    return found


async def test_by_default_they_are_files_in_the_state_folder(tmp_path: Path) -> None:
    own = settings_in(tmp_path)
    await put_both(own)
    assert await read_both(own) == ([WORKER], [ADAPTER])
    assert (tmp_path / "state" / "state.sqlite").exists()
    assert (model_folder(own) / "catalog.sqlite").exists()
    assert model_folder(own) == tmp_path / "state" / "models" / model_identity(own.model)[:16]


async def test_one_store_is_for_all_state_folders(tmp_path: Path, redis_server: RedisServer) -> None:
    for state in (redis_server.url(), str(tmp_path / "shared.sqlite"), f"sqlite://{tmp_path}/other.sqlite"):
        one = settings_in(tmp_path, state=state)
        other = one.model_copy(update={"state_dir": tmp_path / "elsewhere"})
        await put_both(one)
        assert await read_both(other) == ([WORKER], [ADAPTER])
    assert not (tmp_path / "state").exists()


async def test_base_models_do_not_share_a_catalog(tmp_path: Path, redis_server: RedisServer) -> None:
    other_model = tmp_path / "other"
    write_base(other_model)
    (other_model / "config.json").write_text((other_model / "config.json").read_text().replace("{", '{"x": 1, ', 1))
    for state in (redis_server.url(), str(tmp_path / "shared.sqlite")):
        one = settings_in(tmp_path, state=state)
        other = one.model_copy(update={"model": other_model})
        await put_both(one)
        if state.startswith("redis"):
            assert await read_both(other) == ([], [])
        else:
            with pytest.raises(ConfigError, match="each base model needs a file of its own"):
                open_registrations(other)
