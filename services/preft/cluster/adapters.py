"""The adapter store of one machine, wired from settings: its catalog, disk tier, and each worker's adapter store."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import re
import shutil
import time
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

from preft.adapters.catalog.adapter_catalog import PINNED_SHARE, Catalog, CatalogLimits
from preft.adapters.catalog.folder_watch import FolderWatch
from preft.adapters.catalog.view import CatalogView
from preft.adapters.formats.base_model import read_base_model
from preft.adapters.sources.limits import SourceLimits, SourceRules
from preft.adapters.sources.peers import Peers
from preft.adapters.sources.source import open_source
from preft.adapters.store.adapter_store import AdapterStore
from preft.adapters.store.disk_tier import DiskTier
from preft.cluster.stores import model_folder, open_catalog_store
from preft.core.background import Background
from preft.core.cluster import Adapter
from preft.core.errors import ConfigError, PreftError, SourceNotFound, Unavailable
from preft.core.ports import StateStore
from preft.core.request import AdapterRef
from preft.core.settings import SCHEMES, Settings, is_loopback
from preft.engine.port import Engine
from preft.memory.arena import StagingArena
from preft.rpc.secret import ClusterSecret
from preft.state import shown
from preft.worker.setup import OpenedAdapters

logger = logging.getLogger(__name__)

PARTIAL_UPLOADS = (".unfinished-", "upload-")  # name prefixes of unfinished uploads
ABANDONED_SECONDS = 24 * 3600.0
PAUSE_SECONDS = 0.1  # after the catalog was read: further changes meanwhile are read together
NOT_UP_TO_DATE = "the adapter catalog is not up to date"  # the beginning of its log lines


@asynccontextmanager
async def open_catalog(settings: Settings) -> AsyncIterator[Catalog]:
    """The served model's catalog with the settings' adapters. The catalog follows the state store within the context.

    Each base model has its own catalog; equal adapter content is stored once. Raises ConfigError if an adapter can't be
    served, or has the base model's name, and Unavailable if the store can't be used.
    """
    store = open_catalog_store(settings)
    try:
        own = settings.store
        limits = CatalogLimits(
            settings.prefill.max_lora_rank,
            int(min(own.host_bytes, own.disk_bytes) * PINNED_SHARE),
            own.max_adapter_bytes,
            source_limits(settings),
            max(own.catalog_timeout, 2 * settings.router.poll_interval),
            tenant_source_limits(settings),
        )
        uploads, prefix = uploads_folder(settings), _upload_prefix(settings)
        base = read_base_model(settings.model)
        catalog = Catalog(store, open_disk_tier(settings), uploads, base, settings.model_name, limits, prefix)
        await catalog.refresh()
        known = {adapter.source for adapter in catalog.list()} if _is_same_catalog(settings, catalog.epoch) else None
        await asyncio.to_thread(_sweep, uploads, prefix, known)
        if catalog.get(settings.model_name) is not None:
            raise ConfigError(
                f"served_model_name: {settings.model_name!r} is the name of an adapter in the catalog: choose another "
                "name for the base model, or remove the adapter while it has one"
            )
        try:
            async with asyncio.TaskGroup() as group:
                for name, source in settings.adapters.items():
                    group.create_task(_add_configured(catalog, name, source))
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None
        background = Background()
        background.every(PAUSE_SECONDS, lambda: catalog.watch(settings.router.poll_interval), NOT_UP_TO_DATE)
        if settings.adapter_dir is not None:
            watch = FolderWatch(settings.adapter_dir, catalog)
            background.every(watch.pause, watch.scan, f"the adapters in {settings.adapter_dir} are not followed")
        try:
            yield catalog
        finally:
            await background.close()
    finally:
        await store.close()


@asynccontextmanager
async def open_adapters(
    settings: Settings,
    secret: ClusterSecret,
    workers: StateStore,
    worker_id: str,
    memory: StagingArena,
    engine: Engine,
    slots: int,
) -> AsyncIterator[OpenedAdapters]:
    """One worker's adapters, which follow the catalog within the context. Raises as `open_disk_tier`."""
    disk, limits = open_disk_tier(settings), source_limits(settings)
    peers = None
    if settings.state is not None:  # else all processes share this machine's disk tier
        peers = Peers(secret, limits, partial(_others, workers, worker_id))
    adapters = AdapterStore(disk, memory, engine, slots, limits, peers=peers)
    try:
        async with following_catalog(settings, adapters):
            yield OpenedAdapters(disk, adapters, peers)
    finally:
        await adapters.close()


async def _others(workers: StateStore, worker_id: str) -> list[str]:
    """The addresses of the other workers with adapters. Raises Unavailable."""
    known = await workers.workers()
    return [one.address for one in known if one.adapter_slots and one.address and one.id != worker_id]


@asynccontextmanager
async def following_catalog(settings: Settings, adapters: AdapterStore) -> AsyncIterator[None]:
    """Within the context, the store keeps the catalog's pinned adapters, and drops adapters that left the catalog."""
    store = open_catalog_store(settings)
    view, background = CatalogView(store), Background()
    followed, left = -1, set[str]()

    async def follow(timeout: float = settings.router.poll_interval) -> None:
        nonlocal followed
        left.update(await view.watch(timeout))
        if view.revision == followed:
            return
        adapters.pin(view.pinned)
        adapters.forget(left)
        for adapter in view.list() if view.pinned else ():
            if adapter.pinned and adapters.state(adapter.digest) is None:
                background.start(_bring_in(adapter, adapters), f"the load of the pinned adapter {adapter.name!r}")
        left.clear()
        followed = view.revision

    try:
        await follow(0)
        background.every(PAUSE_SECONDS, follow, NOT_UP_TO_DATE)
        yield
    finally:
        await background.close()
        await store.close()


async def _bring_in(adapter: Adapter, adapters: AdapterStore) -> None:
    try:
        await adapters.prefetch(AdapterRef(adapter.name, adapter.digest, adapter.source))
    except PreftError as error:
        logger.warning("the pinned adapter %r isn't in memory: %s", adapter.name, error)


def open_disk_tier(settings: Settings) -> DiskTier:
    """The disk tier that all processes of this machine share. Raises Unavailable if its folder can't be used."""
    return DiskTier(settings.state_dir / "adapters", settings.store.disk_bytes, settings.store.max_adapter_bytes)


def source_limits(settings: Settings) -> SourceLimits:
    """The limits for sources, equal in every process. Sources named in the settings are always allowed."""
    allowed = settings.adapter_sources
    if allowed is None:  # only this machine's users reach a loopback address, unless a proxy serves it
        own_users = is_loopback(settings.host) and not settings.allowed_hosts
        allowed = ("/", *(f"{scheme}://" for scheme in SCHEMES)) if own_users else ()
    own = (*settings.adapters.values(), *filter(None, [settings.adapter_dir]), uploads_folder(settings))
    rules = SourceRules((*allowed, *map(str, own)))
    return SourceLimits(settings.store.source_timeout, settings.store.source_min_rate, rules)


def tenant_source_limits(settings: Settings) -> SourceLimits:
    """The limits for sources in tenants' requests: the setting alone, which says what all tenants may read."""
    rules = SourceRules(settings.adapter_sources or ())
    return SourceLimits(settings.store.source_timeout, settings.store.source_min_rate, rules)


def uploads_folder(settings: Settings) -> Path:
    """The folder of the base model's uploaded adapters and unfinished uploads."""
    return model_folder(settings) / "uploads"


async def _add_configured(catalog: Catalog, name: str, source: str) -> None:
    """Adds an adapter of the settings. If its source is unavailable, the version on disk is served."""
    before = catalog.get(name)
    try:
        await catalog.add(name, source, replace=True)
    except (Unavailable, SourceNotFound) as error:
        if before is None or before.source != open_source(source).uri or not catalog.has_copy(before):
            raise ConfigError(f"adapters.{name}: {error}") from error
        logger.warning("adapter %r is served as it was, version %d: %s", name, before.version, error)
    except PreftError as error:
        raise ConfigError(f"adapters.{name}: {error}") from error


def _is_same_catalog(settings: Settings, epoch: str) -> bool:
    """Whether the last start saw this catalog too. A store that was emptied lacks names that may come back."""
    path = model_folder(settings) / f"{_upload_prefix(settings)}catalog_epoch"
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if path.exists() and path.read_text() == epoch != "":
        return True
    path.write_text(epoch)
    return False


def _upload_prefix(settings: Settings) -> str:
    """The beginning of the names of uploads that the store's catalog names. Other stores may know the other uploads."""
    if settings.state is None:
        return ""
    return hashlib.sha256(shown(settings.state.get_secret_value()).encode()).hexdigest()[:8] + "-"


def _sweep(uploads: Path, prefix: str, sources: Collection[str] | None) -> None:
    """Removes uploads that a killed process left unfinished.

    Given `sources`, also removes finished uploads of this `prefix` that are not among them.
    """
    finished = re.compile(f"{prefix}[0-9a-f]{{32}}")
    for upload in uploads.iterdir() if uploads.is_dir() else ():
        is_unknown = sources is not None and finished.fullmatch(upload.name) and str(upload) not in sources
        if upload.name.startswith(PARTIAL_UPLOADS) or is_unknown:
            with contextlib.suppress(FileNotFoundError):  # another process has removed it
                if time.time() - upload.stat().st_mtime < ABANDONED_SECONDS:
                    continue
                if upload.is_dir():
                    shutil.rmtree(upload, ignore_errors=True)
                else:
                    upload.unlink()
