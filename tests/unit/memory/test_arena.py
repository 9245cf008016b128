import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preft.memory import arena as module
from preft.memory.arena import HEADER_BYTES, Region, StagingArena, StagingView, span_of
from preft.memory.errors import NoRoom, StaleRegion, TooLarge

SERVICES = Path(module.__file__).parents[2]


@pytest.fixture
def arena() -> Iterator[StagingArena]:
    """Room for four regions of 1000 bytes, and no more."""
    arena = StagingArena.create(4 * span_of(1000))
    yield arena
    arena.close()


@pytest.fixture
def view(arena: StagingArena) -> Iterator[StagingView]:
    view = StagingView(arena.path)
    yield view
    view.close()


async def until_unused(arena: StagingArena) -> None:
    async with asyncio.timeout(5):
        while arena.used:
            await asyncio.sleep(0.001)


async def test_what_one_side_writes_the_other_reads(arena: StagingArena, view: StagingView) -> None:
    region = await arena.reserve(1000, timeout=1)
    assert region.offset % 64 == 0
    with view.hold(region) as payload:
        payload[:] = b"k" * 1000
    assert bytes(arena.view(region)) == b"k" * 1000
    assert (arena.used, arena.regions) == (span_of(1000), 1)
    arena.release(region)
    arena.release(region)
    assert (arena.used, arena.regions) == (0, 0)


async def test_never_fitting_is_refused_at_once(arena: StagingArena) -> None:
    whole = await arena.reserve(arena.capacity - HEADER_BYTES, timeout=1)
    assert arena.used == arena.capacity
    for size in (arena.capacity - HEADER_BYTES + 1, 0, -1):
        with pytest.raises(TooLarge):
            await arena.reserve(size, timeout=60)
    arena.release(whole)


async def test_waits_for_room_and_gives_up_in_time(arena: StagingArena) -> None:
    regions = [await arena.reserve(1000, timeout=1) for _ in range(4)]
    with pytest.raises(NoRoom, match=r"no room for 5 bytes .* within 0\.01 s"):
        await arena.reserve(5, timeout=0.01)
    waiting = asyncio.create_task(arena.reserve(5, timeout=5))
    await asyncio.sleep(0)
    arena.release(regions[2])
    assert (await waiting).offset == regions[2].offset


async def test_small_requests_do_not_overtake_a_large_one(arena: StagingArena) -> None:
    regions = [await arena.reserve(1000, timeout=1) for _ in range(4)]
    large = asyncio.create_task(arena.reserve(1900, timeout=5))
    small = asyncio.create_task(arena.reserve(5, timeout=5))
    await asyncio.sleep(0)
    arena.release(regions[0])
    newcomer = asyncio.create_task(arena.reserve(5, timeout=5))
    await asyncio.sleep(0.01)
    assert not any(task.done() for task in (large, small, newcomer))
    large.cancel()  # the others move up when the first leaves the queue
    assert (await small).offset == regions[0].offset
    assert (await newcomer).offset > regions[0].offset


async def test_nothing_is_lost_when_the_waiter_is_cancelled_as_it_is_served(arena: StagingArena) -> None:
    regions = [await arena.reserve(1000, timeout=1) for _ in range(4)]
    waiting = asyncio.create_task(arena.reserve(1000, timeout=5))
    await asyncio.sleep(0)
    arena.release(regions[0])
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    for region in regions:
        arena.release(region)
    assert arena.used == 0


async def test_evicts_the_least_recently_used(arena: StagingArena) -> None:
    a, b, c, d = [await arena.reserve(1000, timeout=1) for _ in range(4)]
    evicted: list[str] = []
    for region, name in ((b, "b"), (a, "a"), (d, "d"), (b, "b")):
        arena.mark_evictable(region, lambda name=name: evicted.append(name))
    for expected in (a, d, b):
        assert (await arena.reserve(1000, timeout=0.01)).offset == expected.offset
    assert evicted == ["a", "d", "b"]
    with pytest.raises(StaleRegion):
        arena.view(a)
    arena.mark_evictable(a, lambda: evicted.append("never"))  # gone already
    with pytest.raises(NoRoom):
        await arena.reserve(1000, timeout=0.01)
    arena.view(c)


async def test_what_is_kept_stays_until_it_is_marked_again_or_released(arena: StagingArena) -> None:
    a, b, c, d = [await arena.reserve(1000, timeout=1) for _ in range(4)]
    evicted: list[str] = []
    arena.mark_evictable(a, lambda: evicted.append("a"))
    arena.mark_evictable(b, lambda: evicted.append("b"))
    arena.keep(a)
    arena.keep(a)
    arena.keep(c)  # was never evictable
    assert (await arena.reserve(1000, timeout=0.01)).offset == b.offset
    with pytest.raises(NoRoom):
        await arena.reserve(1000, timeout=0.01)
    assert evicted == ["b"]
    waiting = asyncio.create_task(arena.reserve(1000, timeout=5))
    await asyncio.sleep(0)
    arena.mark_evictable(a, lambda: evicted.append("a, later"))
    assert (await waiting).offset == a.offset
    assert evicted == ["b", "a, later"]
    arena.keep(a)  # gone already
    with pytest.raises(StaleRegion):
        arena.view(a)
    arena.keep(d)
    arena.release(d)
    assert (await arena.reserve(1000, timeout=0.01)).offset == d.offset


async def test_evicts_nothing_in_vain_and_nothing_outside_the_hole(arena: StagingArena) -> None:
    a, b, c, d = [await arena.reserve(1000, timeout=1) for _ in range(4)]
    evicted: list[str] = []
    arena.mark_evictable(a, lambda: evicted.append("a"))
    arena.mark_evictable(c, lambda: evicted.append("c"))
    with pytest.raises(NoRoom):
        await arena.reserve(1900, timeout=0.01)
    assert evicted == []
    waiting = asyncio.create_task(arena.reserve(1900, timeout=5))
    await asyncio.sleep(0)
    arena.mark_evictable(d, lambda: evicted.append("d"))  # somebody who waits is served by a new candidate
    assert (await waiting).offset == c.offset
    assert evicted == ["c", "d"]
    arena.view(a), arena.view(b)


async def test_pinned_ones_go_only_for_what_fits_nowhere_beside_them(arena: StagingArena) -> None:
    a, b, c, d = [await arena.reserve(1000, timeout=1) for _ in range(4)]
    evicted: list[str] = []
    for region, name in ((b, "b"), (d, "d"), (a, "a")):
        arena.pin(region, name != "a")
        arena.mark_evictable(region, lambda name=name: evicted.append(name))
    assert (await arena.reserve(1000, timeout=0.01)).offset == a.offset  # b was used less recently
    with pytest.raises(NoRoom):
        await arena.reserve(1000, timeout=0.01)  # there would be room without c
    assert evicted == ["a"]
    waiting = asyncio.create_task(arena.reserve(2 * span_of(1000) - HEADER_BYTES, timeout=5))
    await asyncio.sleep(0)
    assert not waiting.done()  # in vain, as long as c is in use
    arena.mark_evictable(c, lambda: evicted.append("c"))
    assert (await waiting).offset == b.offset
    assert sorted(evicted) == ["a", "b", "c"]
    arena.pin(d, False)
    assert (await arena.reserve(1000, timeout=0.01)).offset == d.offset


async def test_a_pinned_one_takes_the_place_of_smaller_pinned_ones_only() -> None:
    arena, double = StagingArena.create(6 * span_of(1000)), 2 * span_of(1000) - HEADER_BYTES
    sizes = (1000, 1000, 1000, double, 1000)
    first, small, _, large, _ = [await arena.reserve(size, timeout=1, pinned=True) for size in sizes]
    arena.release(first)
    evicted: list[Region] = []
    arena.mark_evictable(large, lambda: evicted.append(large))
    with pytest.raises(NoRoom):
        await arena.reserve(double, timeout=0.01, pinned=True)
    arena.mark_evictable(small, lambda: evicted.append(small))
    assert (await arena.reserve(double, timeout=0.01, pinned=True)).offset == first.offset
    assert evicted == [small]
    assert (await arena.reserve(double, timeout=0.01)).offset == large.offset
    arena.close()


async def test_a_stale_region_can_not_be_held(arena: StagingArena, view: StagingView) -> None:
    region = await arena.reserve(1000, timeout=1)
    for wrong in (
        replace(region, nonce=bytes(16)),
        replace(region, size=999),
        replace(region, offset=region.offset + 64),
        replace(region, offset=0),
        replace(region, offset=arena.capacity),
    ):
        with pytest.raises(StaleRegion), view.hold(wrong):
            pass
    arena.release(region)
    again = await arena.reserve(1000, timeout=1)
    assert again.offset == region.offset
    with pytest.raises(StaleRegion), view.hold(region):
        pass
    arena.release(again)
    assert arena.used == 0  # refused holds leave no lock behind


async def test_held_bytes_are_not_reused_before_the_last_holder_is_out(arena: StagingArena, view: StagingView) -> None:
    region = await arena.reserve(arena.capacity - HEADER_BYTES, timeout=1)
    waiting = asyncio.create_task(arena.reserve(1000, timeout=5))
    with view.hold(region) as payload:
        with view.hold(region):
            arena.release(region)
            with pytest.raises(StaleRegion), view.hold(region):
                pass
        await asyncio.sleep(0.02)
        assert not waiting.done()
        assert (arena.used, arena.regions) == (arena.capacity, 0)
        payload[:] = b"x" * region.size
    arena.release(await waiting)
    assert arena.used == 0


async def test_a_dead_engine_holds_nothing(arena: StagingArena) -> None:
    region = await arena.reserve(1000, timeout=1)
    code = (
        "import sys\nfrom preft.memory.arena import Region, StagingView\n"
        f"with StagingView({arena.path!r}).hold({region!r}) as payload:\n"
        "    payload[:2] = b'hi'\n    print('in', flush=True)\n    sys.stdin.read()\n"
    )
    engine = subprocess.Popen(  # noqa: ASYNC220
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(SERVICES)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with engine:
        assert engine.stdout is not None
        assert engine.stdout.readline() == b"in\n"
        assert bytes(arena.view(region)[:2]) == b"hi"
        arena.release(region)
        await asyncio.sleep(0.02)
        assert arena.used == region.span
        engine.send_signal(signal.SIGKILL)
        await until_unused(arena)


async def test_closing_refuses_waiters_and_newcomers() -> None:
    arena = StagingArena.create(4096)
    region = await arena.reserve(4000, timeout=1)
    view = arena.view(region)
    waiting = asyncio.create_task(arena.reserve(1, timeout=60))
    await asyncio.sleep(0)
    arena.close()
    arena.close()
    with pytest.raises(NoRoom, match="closed"):
        await waiting
    with pytest.raises(NoRoom, match="closed"):
        await arena.reserve(1, timeout=60)
    view[0] = 1  # still mapped while somebody looks at it
    with pytest.raises(FileNotFoundError):
        StagingView(arena.path)


STEP = st.tuples(
    st.sampled_from(["reserve", "release", "cancel", "evictable", "keep", "pin", "hold", "unhold"]), st.integers(1, 900)
)


@settings(deadline=None, max_examples=150)
@given(st.lists(STEP, max_size=60))
def test_regions_never_overlap_are_served_in_order_and_all_come_back(steps: list[tuple[str, int]]) -> None:
    async def scenario() -> None:
        arena = StagingArena.create(2048)
        view = StagingView(arena.path)
        live: dict[Region, bytes] = {}  # and the bytes it must hold
        order: list[int] = []
        held: list[tuple[contextlib.ExitStack, memoryview, bytes]] = []
        tasks: dict[int, asyncio.Task[None]] = {}
        kept: set[Region] = set()

        def evict(region: Region) -> None:
            assert region not in kept
            live.pop(region, None)

        async def reserve(number: int, size: int) -> None:
            region = await arena.reserve(size, timeout=60)
            order.append(number)
            live[region] = bytes([number + 1]) * size
            arena.view(region)[:] = live[region]

        for number, (action, argument) in enumerate(steps):
            regions = list(live)
            chosen = regions[argument % len(regions)] if regions else None
            if action == "reserve":
                tasks[number] = asyncio.create_task(reserve(number, argument))
            elif action == "cancel" and tasks:
                list(tasks.values())[argument % len(tasks)].cancel()
            elif action == "unhold" and held:
                held.pop(argument % len(held))[0].close()
            elif chosen is not None and action == "release":
                del live[chosen]
                arena.release(chosen)
            elif chosen is not None and action == "evictable":
                kept.discard(chosen)
                arena.mark_evictable(chosen, lambda chosen=chosen: evict(chosen))
            elif chosen is not None and action == "keep":
                kept.add(chosen)
                arena.keep(chosen)
            elif chosen is not None and action == "pin":
                arena.pin(chosen, argument % 3 > 0)
            elif chosen is not None and action == "hold":
                stack = contextlib.ExitStack()
                payload = stack.enter_context(view.hold(chosen))
                held.append((stack, payload, live[chosen]))
            for _ in range(3):
                await asyncio.sleep(0)
            assert all(bytes(payload) == expected for _, payload, expected in held)
            assert all(bytes(arena.view(region)) == expected for region, expected in live.items())
            assert arena.regions == len(live)
            assert arena.used >= sum(region.span for region in live)
        assert order == sorted(order)
        for task in tasks.values():
            task.cancel()
        await asyncio.gather(*tasks.values(), return_exceptions=True)
        for stack, _, _ in held:
            stack.close()
        for region in list(live):
            arena.release(region)
        await until_unused(arena)
        held.clear()
        view.close()
        arena.close()

    asyncio.run(scenario())


async def test_what_fits_counts_copies_that_make_room(arena: StagingArena) -> None:
    assert arena.fit == arena.capacity
    regions = [await arena.reserve(1000, timeout=1) for _ in range(4)]
    span = span_of(1000)
    assert arena.fit == 0
    for number in (0, 2):
        arena.mark_evictable(regions[number], lambda: None)
    assert arena.fit == span
    arena.release(regions[1])
    assert arena.fit == 3 * span
    arena.keep(regions[2])
    assert arena.fit == 2 * span
    waiting = asyncio.create_task(arena.reserve(3000, timeout=5))
    await asyncio.sleep(0)
    assert arena.fit == 0  # a new reservation would wait behind that one
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert arena.fit == 2 * span
    arena.close()
    assert arena.fit == 0


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(1, 900), min_size=1, max_size=12),
    st.lists(st.sampled_from(["stays", "released", "evictable", "pinned", "pinned and evictable"]), min_size=12),
)
def test_what_fits_is_what_can_be_reserved(sizes: list[int], fates: list[str]) -> None:
    async def scenario() -> None:
        with contextlib.closing(StagingArena.create(4096)) as arena:
            regions = []
            for size in sizes:
                with contextlib.suppress(NoRoom):
                    regions.append(await arena.reserve(size, timeout=0.0))
            for region, fate in zip(regions, fates, strict=False):
                arena.pin(region, "pinned" in fate)
                if "evictable" in fate:
                    arena.mark_evictable(region, lambda: None)
                elif fate == "released":
                    arena.release(region)
            fit = arena.fit
            for size in range(fit - HEADER_BYTES + 1, arena.capacity - HEADER_BYTES + 1, HEADER_BYTES):
                with pytest.raises(NoRoom):
                    await arena.reserve(max(1, size), timeout=0.0)
            assert arena.fit == fit  # nothing was evicted in vain
            if fit > HEADER_BYTES:
                await arena.reserve(fit - HEADER_BYTES, timeout=0.0)

    asyncio.run(scenario())
