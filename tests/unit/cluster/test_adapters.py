"""The catalog as a gateway opens it, and as a worker follows it."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import stat
import tarfile
import time
from pathlib import Path
from typing import ClassVar

import pytest

from preft.adapters.catalog.adapter_catalog import Catalog
from preft.adapters.formats.digest import adapter_digest
from preft.adapters.sources.limits import SourceLimits
from preft.adapters.sources.source import open_source
from preft.cli.packing import Package
from preft.cluster.adapters import following_catalog, open_catalog, open_disk_tier, source_limits, uploads_folder
from preft.core.cluster import AdapterState, Role
from preft.core.errors import ConfigError, InvalidAdapter
from preft.core.ports import AdapterChanges
from preft.core.request import AdapterRef
from preft.core.settings import MiB, Settings, load_settings
from preft.memory.arena import StagingArena
from preft.state.sqlite import SqliteStore
from support.adapter_tiers import adapter_store
from support.fake_engine import FakeEngine
from support.faulty_http import serve_folder
from support.lora_folders import write_base, write_lora
from support.redis_server import RedisServer
from support.worker_services import until


def settings_in(folder: Path, **changes: object) -> Settings:
    model = folder / "model"
    if not model.exists():
        write_base(model)
    return load_settings(None, {"model": str(model), "state_dir": str(folder / "state"), **changes})


async def upload(catalog: Catalog, name: str, folder: Path) -> Path:
    """Adds the adapter as an archive. Returns the folder that keeps its content."""
    archive = folder.with_suffix(".tar")
    archive.write_bytes(b"".join(Package.of(folder)))
    return Path((await catalog.add_archive(name, archive)).source)


async def test_configured_adapters_and_a_watched_folder_are_there(tmp_path: Path) -> None:
    write_lora(tmp_path / "ada")
    write_lora(tmp_path / "many" / "bob", seed=2)
    own = settings_in(tmp_path, adapters={"ada": str(tmp_path / "ada")}, adapter_dir=str(tmp_path / "many"))
    async with open_catalog(own) as catalog:
        assert catalog.get("ada") is not None
        await until(lambda: catalog.get("bob") is not None)
    async with open_catalog(settings_in(tmp_path)) as again:
        assert [adapter.name for adapter in again.list()] == ["ada", "bob"]


class BreakingStore(SqliteStore):
    """Fails as nobody expects, for as long as there are `faults`."""

    faults: ClassVar[list[BaseException]] = []

    async def adapter_changes(self, since: int) -> AdapterChanges:
        if self.faults:
            raise self.faults.pop()
        return await super().adapter_changes(since)


@pytest.mark.parametrize("fault", [KeyError("unexpected"), asyncio.CancelledError()])
async def test_no_fault_makes_the_catalog_answer_with_old_versions_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: BaseException
) -> None:
    """Seen by the gateway, and by a worker, which keeps what is pinned."""
    monkeypatch.setattr("preft.cluster.stores.open_store", BreakingStore)
    settings = settings_in(tmp_path)
    async with open_catalog(settings) as catalog, open_catalog(settings) as elsewhere:
        adapters = ForgettingStore()
        async with following_catalog(settings, adapters):  # type: ignore[arg-type]
            first = await elsewhere.add("ada", str(write_lora(tmp_path / "1")))
            await until(lambda: catalog.get("ada") == first and adapters.changes == 2)
            BreakingStore.faults.extend([fault] * 6)
            await until(lambda: not BreakingStore.faults)
            adapters.broken = True
            second = await elsewhere.add("ada", str(write_lora(tmp_path / "2", seed=2)), replace=True)
            await until(lambda: catalog.get("ada") == second)
            await until(lambda: not adapters.broken)
            await until(lambda: adapters.forgotten == {first.digest})


class ForgettingStore:
    """As much of an AdapterStore as following the catalog needs. `broken` fails one call."""

    digests = ()

    def __init__(self) -> None:
        self.broken = False
        self.changes = 0  # of the catalog, the first look included
        self.forgotten: set[str] = set()

    def pin(self, digests: frozenset[str]) -> None:
        self.changes += 1
        if self.broken:
            self.broken = False
            raise KeyError("unexpected")

    def forget(self, digests: set[str]) -> None:
        self.forgotten |= digests


async def test_a_base_model_that_takes_an_adapters_name_is_refused(tmp_path: Path) -> None:
    """It would answer the requests for the adapter."""
    async with open_catalog(settings_in(tmp_path)) as catalog:
        await catalog.add("ada", str(write_lora(tmp_path / "ada")))
    with pytest.raises(ConfigError, match=r"^served_model_name: 'ada' is the name of an adapter"):
        async with open_catalog(settings_in(tmp_path, served_model_name="ada")):
            pass


async def test_a_source_that_does_not_answer_ends_no_start(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_lora(tmp_path / "served" / "ada")
    with serve_folder(tmp_path / "served") as server:
        own = settings_in(tmp_path, adapters={"ada": f"{server.url}/ada/"}, store={"source_timeout": 0.3})
        async with open_catalog(own) as catalog:
            first = catalog.get("ada")
        server.faults.status["adapter_config.json"] = 503
        async with open_catalog(own) as catalog:
            assert catalog.get("ada") == first
    async with open_catalog(own) as catalog:  # nobody is there
        assert catalog.get("ada") == first
    assert "adapter 'ada' is served as it was, version 1" in caplog.text
    assert first is not None
    open_disk_tier(own).discard(first.digest)
    with pytest.raises(ConfigError, match=r"^adapters\.ada: .*the connection failed"):
        async with open_catalog(own):
            pass


async def test_a_folder_that_is_gone_ends_no_start_while_there_is_a_copy(tmp_path: Path) -> None:
    own = settings_in(tmp_path, adapters={"ada": str(write_lora(tmp_path / "ada"))})
    async with open_catalog(own) as catalog:
        first = catalog.get("ada")
    shutil.rmtree(tmp_path / "ada")
    async with open_catalog(own) as catalog:
        assert catalog.get("ada") == first
    moved = settings_in(tmp_path, adapters={"ada": str(tmp_path / "elsewhere")})
    with pytest.raises(ConfigError, match=r"^adapters\.ada: there is no folder"):
        async with open_catalog(moved):
            pass


async def test_what_has_not_changed_is_not_fetched_again(tmp_path: Path) -> None:
    for number in range(20):
        write_lora(tmp_path / "served" / f"a{number}", seed=number)
    with serve_folder(tmp_path / "served") as server:
        own = settings_in(tmp_path, adapters={f"a{number}": f"{server.url}/a{number}" for number in range(20)})
        async with open_catalog(own) as catalog:
            first = list(catalog.list())
        assert len(first) == 20
        server.requests.clear()
        async with open_catalog(own) as catalog:
            assert list(catalog.list()) == first
        assert not any(re.fullmatch("GET .*/adapter_model.*", request) for request in server.requests)
        write_lora(tmp_path / "served" / "a7", seed=100)
        async with open_catalog(own) as catalog:
            changed = catalog.get("a7")
    assert changed is not None
    assert changed.version == 2


async def test_adapters_are_their_owners_alone(tmp_path: Path) -> None:
    own = settings_in(tmp_path)
    before = os.umask(0o022)
    try:
        async with open_catalog(own) as catalog:
            added = await catalog.add("ada", str(write_lora(tmp_path / "ada")))
            archive = tmp_path / "bob.tar"
            with tarfile.open(archive, "w") as tar:
                tar.add(write_lora(tmp_path / "bob", seed=2), "bob")
            await catalog.add_archive("bob", archive)
    finally:
        os.umask(before)
    folders = [tmp_path / "state" / "adapters", uploads_folder(own), uploads_folder(own).parent]
    assert {stat.S_IMODE(folder.stat().st_mode) for folder in folders} == {0o700}
    copy = tmp_path / "state" / "adapters" / added.digest
    assert {stat.S_IMODE(path.stat().st_mode) & 0o077 for path in (copy, *copy.iterdir())} == {0}


def limits_of(tmp_path: Path, **changes: object) -> SourceLimits:
    return source_limits(settings_in(tmp_path, **changes))


def test_by_default_who_may_name_what_depends_on_who_can_ask(tmp_path: Path) -> None:
    """A user of the machine may name its folders, and places outside; others only what the operator has named."""
    (tmp_path / "ada").mkdir()
    for host in ("127.0.0.1", "::1", "localhost"):
        limits = limits_of(tmp_path, host=host)
        for fine in (str(tmp_path / "ada"), "https://example.org/ada"):
            open_source(fine, limits)
        for uri in ("http://127.0.0.1:1/ada", "https://169.254.169.254/latest"):
            with pytest.raises(InvalidAdapter, match="adapter_sources"):
                open_source(uri, limits)
    named = {"adapters": {"bob": "https://10.0.0.1/bob"}, "adapter_dir": str(tmp_path / "many")}
    proxied = limits_of(tmp_path, allowed_hosts=["models.example.org"], **named)
    limits = limits_of(tmp_path, host="0.0.0.0", **named)
    assert proxied == limits
    for fine in ("https://10.0.0.1/bob", str(tmp_path / "many" / "cay")):
        open_source(fine, limits)
    for uri in (str(tmp_path / "ada"), "https://example.org/ada", "https://10.0.0.1/other"):
        with pytest.raises(InvalidAdapter, match="adapter_sources"):
            open_source(uri, limits)
    limits = limits_of(tmp_path, host="0.0.0.0", adapter_sources=["https://example.org/team", str(tmp_path)], **named)
    for fine in ("https://10.0.0.1/bob", str(tmp_path / "ada"), "https://example.org/team/ada"):
        open_source(fine, limits)
    with pytest.raises(ConfigError, match=r"^adapter_sources"):
        limits_of(tmp_path, adapter_sources=["ftp://host"])


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


async def test_uploads_outlive_a_store_that_lost_the_catalog(tmp_path: Path, redis_server: RedisServer) -> None:
    """Another process may put the names back."""
    settings = settings_in(tmp_path, state=redis_server.url())
    async with open_catalog(settings) as catalog:
        own = await upload(catalog, "bob", write_lora(tmp_path / "bob"))
    unknown = own.with_name(own.name[:-32] + 32 * "0")
    unknown.mkdir()
    for folder in (own, unknown):
        os.utime(folder, (0, 0))
    async with open_catalog(settings):
        assert unknown.exists()  # the catalog had no entry at the last start
    redis_server.empty()
    async with open_catalog(settings):
        assert own.exists()
        assert unknown.exists()
    async with open_catalog(settings) as catalog:
        await catalog.add("bob", str(own))
    for _ in range(2):
        async with open_catalog(settings):
            assert own.exists()
    assert not unknown.exists()


async def test_uploads_that_another_catalog_may_name_stay(tmp_path: Path, redis_server: RedisServer) -> None:
    """Two servers with one state_dir: one has its catalog in Redis, the other in a file."""
    shared, own = settings_in(tmp_path, state=redis_server.url()), settings_in(tmp_path)
    async with open_catalog(shared) as catalog:
        kept = await upload(catalog, "ada", write_lora(tmp_path / "ada"))
        os.utime(kept, (0, 0))
    for _ in range(3):
        async with open_catalog(own):
            assert kept.is_dir()
    async with open_catalog(shared):
        assert kept.is_dir()


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
                assert adapters.states() == {}
                await catalog.pin("ada", True)
                await until(lambda: adapters.state(reference.digest) is AdapterState.HOST)  # nobody has asked for it
                await catalog.pin("ada", False)
                await catalog.remove("ada")
                await until(lambda: adapters.states() == {})
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
