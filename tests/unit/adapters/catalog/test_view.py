"""A process's copy of the catalog keeps its names when the store loses them, and puts them back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import replace

import pytest

from preft.adapters.catalog import view as catalog_view
from preft.adapters.catalog.view import CatalogView
from preft.core.cluster import Adapter
from preft.core.errors import Unavailable
from preft.state.redis_store import RedisStore
from support.redis_server import RedisServer

FIRST = 1000.0  # seconds; when the entries were made


def an_adapter(name: str, number: int = 0, **changes: object) -> Adapter:
    return replace(Adapter(name, f"{number:064x}", f"/s/{name}", 8, created=FIRST + number), **changes)  # type: ignore[arg-type]


class Gateways:
    """Views of several processes, each with its own connection to one Redis."""

    def __init__(self, server: RedisServer, count: int) -> None:
        self.server = server
        self.stores = [RedisStore(server.url(), "test") for _ in range(count)]
        self.views = [CatalogView(store) for store in self.stores]

    async def refresh(self) -> None:
        """All at once."""
        await asyncio.gather(*(view.refresh() for view in self.views))

    async def put(self, *adapters: Adapter) -> None:
        for adapter in adapters:
            assert await self.stores[0].put_adapter(adapter, expect=await self.stores[0].adapter(adapter.name))

    async def stored(self) -> list[Adapter]:
        return list((await self.stores[0].adapter_changes(0)).put)

    async def close(self) -> None:
        for store in self.stores:
            await store.close()


@pytest.fixture
async def gateways(redis_server: RedisServer) -> AsyncIterator[Gateways]:
    gateways = Gateways(redis_server, 3)
    yield gateways
    await gateways.close()


async def test_names_survive_a_store_that_was_emptied(gateways: Gateways, caplog: pytest.LogCaptureFixture) -> None:
    adapters = [an_adapter(f"a{number:03}", number, pinned=number < 3) for number in range(200)]
    await gateways.put(*adapters, an_adapter("removed", 900))
    await gateways.refresh()
    await gateways.stores[1].delete_adapter("removed")
    await gateways.refresh()
    assert all(list(view.list()) == adapters for view in gateways.views)
    for _ in range(2):  # an emptied store may be emptied again
        caplog.clear()
        gateways.server.empty()
        healing = asyncio.create_task(gateways.refresh())
        while not healing.done():
            assert all(list(view.list()) == adapters for view in gateways.views)
            await asyncio.sleep(0)
        await healing
        assert all(list(view.list()) == adapters for view in gateways.views)
        assert all(len(view.pinned) == 3 for view in gateways.views)
        assert await gateways.stored() == adapters
        assert "the state store has lost its latest changes: 200 of 200 adapters are put back" in caplog.text
        assert "is back" not in caplog.text
    await gateways.stores[2].delete_adapter("a000")  # later changes are followed as ever
    await gateways.refresh()
    assert all(view.get("a000") is None for view in gateways.views)
    late = CatalogView(gateways.stores[0])
    await late.refresh()
    assert late.list() == gateways.views[1].list()


async def test_a_view_that_comes_late_puts_back_what_is_missing_alone(gateways: Gateways) -> None:
    """By then the others' names are back, one has moved on, and one was removed."""
    one, two, _ = gateways.views
    await gateways.put(*(an_adapter(name) for name in ("both", "gone", "moved", "twin")))
    await gateways.refresh()
    await gateways.put(an_adapter("seen-by-two"))
    await two.refresh()
    gateways.server.empty()
    await one.refresh()
    assert [adapter.name for adapter in await gateways.stored()] == ["both", "gone", "moved", "twin"]
    await gateways.put(an_adapter("moved", 5))
    await two.refresh()
    await gateways.refresh()
    assert all(
        [adapter.name for adapter in view.list()] == ["both", "gone", "moved", "seen-by-two", "twin"]
        for view in gateways.views
    )
    assert {view.get("moved") for view in gateways.views} == {an_adapter("moved", 5)}


async def test_a_removed_adapter_never_comes_back_in_silence(
    gateways: Gateways, caplog: pytest.LogCaptureFixture
) -> None:
    """The third view missed the removal, and the store lost it."""
    one, two, behind = gateways.views
    await gateways.put(an_adapter("ada"), an_adapter("bob"))
    await gateways.refresh()
    await gateways.stores[0].delete_adapter("ada")
    await asyncio.gather(one.refresh(), two.refresh())
    gateways.server.empty()
    await asyncio.gather(one.refresh(), two.refresh())
    assert [adapter.name for adapter in await gateways.stored()] == ["bob"]
    assert "is back" not in caplog.text
    await behind.refresh()
    await gateways.refresh()
    assert caplog.text.count("the adapter 'ada' was removed and is back as it was") == 2
    caplog.clear()
    await gateways.stores[0].delete_adapter("ada")
    await gateways.put(an_adapter("ada", 7))  # a user adds the name anew
    await gateways.refresh()
    assert "is back" not in caplog.text


async def test_the_latest_of_two_versions_is_kept(gateways: Gateways) -> None:
    """The store came back with an old copy: what it lacks is put back, what was made since is taken."""
    await gateways.put(an_adapter("ada", 1), an_adapter("bob", 1), an_adapter("cay", 1))
    await gateways.refresh()
    await gateways.put(an_adapter("ada", 5, version=2), an_adapter("dan", 6))
    await gateways.refresh()
    gateways.server.empty()
    await gateways.put(an_adapter("ada", 1), an_adapter("bob", 9), an_adapter("cay", 1), an_adapter("eve", 10))
    wanted = [
        an_adapter("ada", 5, version=2),
        an_adapter("bob", 9),
        an_adapter("cay", 1),
        an_adapter("dan", 6),
        an_adapter("eve", 10),
    ]
    await gateways.refresh()
    await gateways.refresh()
    assert all(list(view.list()) == wanted for view in gateways.views)
    assert await gateways.stored() == wanted


async def test_putting_back_goes_on_after_a_failure(gateways: Gateways, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog_view, "PUT_BACK_AT_ONCE", 4)
    adapters = [an_adapter(f"a{number:03}", number) for number in range(30)]
    await gateways.put(*adapters)
    view, store = gateways.views[0], gateways.stores[0]
    await view.refresh()
    gateways.server.empty()
    real, calls = store.put_adapter, 0

    async def failing(adapter: Adapter, *, expect: Adapter | None) -> bool:
        nonlocal calls
        calls += 1
        if calls % 3 == 0:
            raise Unavailable("broken")
        return await real(adapter, expect=expect)

    with pytest.MonkeyPatch.context() as broken:
        broken.setattr(store, "put_adapter", failing)
        for _ in range(40):
            try:
                await view.refresh()
            except Unavailable:
                assert list(view.list()) == adapters
            else:
                break
    assert await gateways.stored() == adapters
    assert not await view.refresh()


async def test_entries_of_a_newer_version_are_left_alone(gateways: Gateways) -> None:
    await gateways.put(an_adapter("ada"), an_adapter("bob"))
    view, store = gateways.views[0], gateways.stores[0]
    await view.refresh()
    gateways.server.empty()
    with pytest.MonkeyPatch.context() as newer:
        newer.setattr(gateways.stores[1]._adapters_format, "write", lambda adapter: '{"name": "ada", "parts": []}')
        assert await gateways.stores[1].put_adapter(an_adapter("ada"), expect=None)
    await view.refresh()
    assert [adapter.name for adapter in view.list()] == ["bob"]
    assert [adapter.name for adapter in await gateways.stored()] == ["bob"]
    with pytest.raises(Unavailable, match="'ada' can't be used"):
        await store.adapter("ada")


async def test_digests_that_left_are_told_once_even_after_a_failure(gateways: Gateways) -> None:
    await gateways.put(an_adapter("ada", 1), an_adapter("bob", 2))
    view, store = gateways.views[0], gateways.stores[0]
    await view.refresh()
    await store.delete_adapter("ada")
    view._lost = {"bob": an_adapter("bob", 2)}  # a refresh in two steps, whose second step fails
    with pytest.MonkeyPatch.context() as broken:
        broken.setattr(store, "put_adapter", failing)
        with pytest.raises(Unavailable):
            await view.refresh()
    assert await view.refresh() == {an_adapter("ada", 1).digest}
    assert await view.refresh() == set()


async def failing(adapter: Adapter, *, expect: Adapter | None) -> bool:
    raise Unavailable("broken")


async def test_changes_spread_at_once(gateways: Gateways) -> None:
    async with AsyncExitStack() as stack:
        for view in gateways.views:
            await view.watch(0.5)
        watching = [asyncio.create_task(_until_known(view)) for view in gateways.views]
        for task in watching:
            stack.callback(task.cancel)
        await asyncio.sleep(0.1)
        started = time.monotonic()
        await gateways.put(an_adapter("ada"))
        await asyncio.wait_for(asyncio.gather(*watching), 10)
        assert time.monotonic() - started < 1


async def _until_known(view: CatalogView) -> None:
    while view.get("ada") is None:
        await view.watch(60)
