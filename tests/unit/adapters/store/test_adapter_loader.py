"""Loads of adapters that their source doesn't give: from the first peer with the right content, or not at all."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from preft.adapters.sources.limits import SourceLimits
from preft.adapters.sources.peers import Peers
from preft.adapters.store.adapter_store import AdapterStore
from preft.core.cluster import Role, Tier
from preft.core.errors import AdapterUnavailable
from preft.core.request import AdapterRef
from preft.core.settings import MiB
from preft.memory.arena import StagingArena
from support.adapter_tiers import adapter_store
from support.content_peers import SECRET, FaultyContent, serving
from support.fake_engine import FakeEngine
from support.worker_services import write_adapter


class Rig:
    """A worker's store, and the peers that it asks, in this order."""

    def __init__(self, stack: AsyncExitStack) -> None:
        self._stack = stack
        self.store: AdapterStore
        self.peers = Peers(SECRET, SourceLimits(0.5, MiB), self._nobody)

    async def _nobody(self) -> list[str]:
        return []

    async def add(self, service: FaultyContent) -> FaultyContent:
        address = await self._stack.enter_async_context(serving(service))
        self._stack.enter_context(self.peers.gateway(address))
        return service


@pytest.fixture
async def rig(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Rig]:
    monkeypatch.setattr("random.shuffle", lambda items: None)
    memory, kv = StagingArena.create(MiB), StagingArena.create(4096)
    engine = FakeEngine(Role.PREFILL, kv.path, memory.path)
    async with AsyncExitStack() as stack:
        rig = Rig(stack)
        rig.store = await stack.enter_async_context(adapter_store(engine, memory, peers=rig.peers))
        yield rig
    await engine.close()
    memory.close()
    kv.close()


@pytest.fixture
def ann(tmp_path: Path) -> AdapterRef:
    """Its source is gone; the content is still in `tmp_path / "kept"`."""
    ann = write_adapter(tmp_path / "ann", "ann's")
    (tmp_path / "ann").rename(tmp_path / "kept")
    return ann


async def use(rig: Rig, adapter: AdapterRef) -> None:
    """A request with the adapter. The engine looks into the memory that it gets."""
    async with rig.store.using(adapter):
        pass


async def test_the_next_peer_is_asked_when_one_fails(rig: Rig, ann: AdapterRef, tmp_path: Path) -> None:
    write_adapter(tmp_path / "other", "another's")
    wrong = await rig.add(FaultyContent(tmp_path / "other"))
    dying = await rig.add(FaultyContent(tmp_path / "kept", fault="dies", healthy=3))
    silent = await rig.add(FaultyContent(tmp_path / "kept", fault="falls silent", healthy=3))
    right = await rig.add(FaultyContent(tmp_path / "kept"))
    unasked = await rig.add(FaultyContent(tmp_path / "kept"))
    await use(rig, ann)
    assert [bool(peer.reads) for peer in (wrong, dying, silent, right, unasked)] == [True, True, True, True, False]
    assert dict(rig.store.totals().loads) == {Tier.SOURCE: 1}


async def test_a_peer_with_a_damaged_copy_still_has_its_source(rig: Rig, ann: AdapterRef, tmp_path: Path) -> None:
    write_adapter(tmp_path / "damaged", "nobody's")
    await rig.add(FaultyContent(tmp_path / "damaged", tmp_path / "gone", tmp_path / "kept"))
    await use(rig, ann)


async def test_a_source_that_answers_is_enough(rig: Rig, ann: AdapterRef, tmp_path: Path) -> None:
    shutil.copytree(tmp_path / "kept", tmp_path / "ann")
    peer = await rig.add(FaultyContent(tmp_path / "kept"))
    await use(rig, ann)
    assert peer.finds == 0


@pytest.mark.parametrize(
    ("is_changed", "why"), [(False, "its source is gone"), (True, "its source no longer holds the version")]
)
async def test_content_that_nobody_has(
    rig: Rig, ann: AdapterRef, tmp_path: Path, *, is_changed: bool, why: str
) -> None:
    if is_changed:
        write_adapter(tmp_path / "ann", "changed")
    await rig.add(FaultyContent(tmp_path / "gone"))
    write_adapter(tmp_path / "other", "another's")
    await rig.add(FaultyContent(tmp_path / "other"))
    with pytest.raises(AdapterUnavailable, match=f"^adapter 'ann' can't be used now: {why}"):
        await use(rig, ann)
    assert rig.store.totals().host_bytes == rig.store.totals().disk_bytes == 0
