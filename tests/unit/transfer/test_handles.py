import asyncio
import hashlib
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from preft.core.errors import TransferFailed
from preft.core.request import KvHeader
from preft.memory.arena import Region, StagingArena
from preft.memory.errors import NoRoom
from preft.transfer import handles
from preft.transfer.handles import Claim, HandleTable
from preft.transfer.port import hash_prompt

PROMPT = hash_prompt([1, 2, 3])
HEADER = KvHeader("h", "llama/f32", "d1", num_tokens=3, num_bytes=1000, checksum=0, uses=1, prompt_hash=PROMPT)
LEASE = 0.3


@pytest.fixture
def arena() -> Iterator[StagingArena]:
    arena = StagingArena.create(1 << 16)
    yield arena
    arena.close()


@pytest.fixture
def table(arena: StagingArena) -> Iterator[HandleTable]:
    """At the end every test must have come back to nothing."""
    table = HandleTable(arena, fingerprint="llama/f32", lease=LEASE)
    yield table
    assert table.open_handles == 0
    assert arena.used == 0


def ignore(end: str) -> None:
    """For handles that nobody aborts."""


async def arrive(table: HandleTable, arena: StagingArena, header: KvHeader = HEADER) -> Region:
    table.open(header, ignore)
    region = await arena.reserve(header.num_bytes, timeout=1)
    table.ready(header.handle, region)
    return region


async def claim(
    table: HandleTable,
    name: str = "h",
    *,
    adapter_digest: str = "d1",
    prompt_hash: bytes = PROMPT,
    num_tokens: int = 3,
    timeout: float = 1,
) -> Claim:
    return await table.claim(
        name, adapter_digest=adapter_digest, prompt_hash=prompt_hash, num_tokens=num_tokens, timeout=timeout
    )


async def test_a_claim_gets_the_region_and_its_end_frees_it(table: HandleTable, arena: StagingArena) -> None:
    region = await arrive(table, arena)
    claimed = await claim(table)
    assert claimed.region == region
    assert (table.open_handles, arena.regions) == (1, 1)
    claimed.loaded()
    claimed.close()
    claimed.close()
    assert (table.open_handles, arena.regions) == (0, 0)
    with pytest.raises(TransferFailed, match="KV handle h is used up"):
        await claim(table)


async def test_a_claim_waits_for_the_last_byte(table: HandleTable, arena: StagingArena) -> None:
    table.open(HEADER, ignore)
    waiting = asyncio.create_task(claim(table))
    await asyncio.sleep(0.01)
    assert not waiting.done()
    table.ready("h", await arena.reserve(1000, timeout=1))
    (await waiting).close()


async def test_a_claim_does_not_wait_for_ever(table: HandleTable) -> None:
    table.open(HEADER, ignore)
    with pytest.raises(TransferFailed, match=r"h did not arrive within 0\.01 s"):
        await claim(table, timeout=0.01)
    table.fail("h", "it was lost")


async def test_what_failed_to_arrive_fails_its_claims_with_the_reason(table: HandleTable) -> None:
    table.open(HEADER, ignore)
    waiting = asyncio.create_task(claim(table))
    await asyncio.sleep(0)
    table.fail("h", "the sender went away")
    for attempt in (waiting, claim(table)):
        with pytest.raises(TransferFailed, match="KV handle h failed to arrive: the sender went away"):
            await attempt
    table.fail("h", "another reason")
    table.fail("unknown", "another reason")


async def test_an_unknown_handle_is_an_error(table: HandleTable) -> None:
    with pytest.raises(TransferFailed, match="KV handle h is unknown"):
        await claim(table)
    with pytest.raises(TransferFailed, match="KV handle h is unknown"):
        table.ready("h", Region(64, 1, bytes(16)))


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        ({"adapter_digest": "d2"}, "adapter"),
        ({"adapter_digest": ""}, "adapter"),
        ({"num_tokens": 2}, "number of prompt tokens"),
        ({"prompt_hash": hash_prompt([1, 2, 4])}, "prompt"),
    ],
)
async def test_kv_of_something_else_is_never_handed_out(
    table: HandleTable, arena: StagingArena, wrong: dict[str, object], what: str
) -> None:
    await arrive(table, arena)
    with pytest.raises(TransferFailed, match=f"KV handle h was made for another {what}"):
        await claim(table, **wrong)  # type: ignore[arg-type]
    (await claim(table)).close()  # the mistake costs the rightful owner nothing


async def test_no_more_claims_than_uses(table: HandleTable, arena: StagingArena) -> None:
    table.open(replace(HEADER, uses=2), ignore)
    waiting = [asyncio.create_task(claim(table)) for _ in range(3)]
    await asyncio.sleep(0)
    table.ready("h", await arena.reserve(1000, timeout=1))
    results = await asyncio.gather(*waiting, return_exceptions=True)
    claims = [result for result in results if isinstance(result, Claim)]
    assert [str(result) for result in results if isinstance(result, TransferFailed)] == [
        "KV handle h has no uses left of 2"
    ]
    assert len(claims) == 2
    claims[0].close()
    assert arena.regions == 1
    claims[1].close()


async def test_only_what_every_use_has_loaded_makes_room(table: HandleTable, arena: StagingArena) -> None:
    size = arena.capacity // 2
    await arrive(table, arena, replace(HEADER, num_bytes=size, uses=2))
    first = await claim(table)
    first.loaded()
    with pytest.raises(NoRoom):
        await arena.reserve(size, timeout=0.001)  # the second use hasn't come yet
    second = await claim(table)
    first.loaded()
    with pytest.raises(NoRoom):
        await arena.reserve(size, timeout=0.001)  # the second hasn't loaded yet
    second.loaded()
    assert not first.evicted
    other = await arena.reserve(size, timeout=0.001)
    assert first.evicted
    assert second.evicted
    assert table.open_handles == 1
    first.close()
    second.loaded()
    second.close()
    arena.view(other)  # not freed by claims on what lay there before
    arena.release(other)


async def test_a_choice_that_ends_before_it_has_loaded_holds_nothing_up(
    table: HandleTable, arena: StagingArena
) -> None:
    size = arena.capacity // 2
    await arrive(table, arena, replace(HEADER, num_bytes=size, uses=2))
    first, second = await claim(table), await claim(table)
    first.loaded()
    second.close()
    second.loaded()
    arena.release(await arena.reserve(size, timeout=0.001))
    first.close()


async def test_a_token_costs_the_same_however_many_choices_there_are(table: HandleTable, arena: StagingArena) -> None:
    """A walk over all of them with each token would take seconds here."""
    await arrive(table, arena, replace(HEADER, uses=3000))
    claims = [await claim(table) for _ in range(3000)]
    started = time.process_time()
    for _ in range(3):
        for claimed in claims:
            claimed.loaded()
    assert time.process_time() - started < 0.3
    for claimed in claims:
        claimed.close()


async def test_release_ends_what_is_ready_and_unclaimed(table: HandleTable, arena: StagingArena) -> None:
    await arrive(table, arena)
    table.release("h")
    table.release("h")
    with pytest.raises(TransferFailed, match="KV handle h was released"):
        await claim(table)


async def test_release_leaves_open_claims_alone(table: HandleTable, arena: StagingArena) -> None:
    await arrive(table, arena, replace(HEADER, uses=3))
    claimed = await claim(table)
    table.release("h")
    assert arena.regions == 1
    with pytest.raises(TransferFailed, match="no uses left"):
        await claim(table)
    claimed.close()


async def test_release_aborts_an_arrival(table: HandleTable, arena: StagingArena) -> None:
    aborted: list[str] = []
    table.open(HEADER, aborted.append)
    waiting = asyncio.create_task(claim(table))
    await asyncio.sleep(0)
    table.release("h")
    assert aborted == ["was released"]
    with pytest.raises(TransferFailed, match="was released"):
        await waiting
    region = await arena.reserve(1000, timeout=1)
    with pytest.raises(TransferFailed, match="was released"):
        table.ready("h", region)
    arena.release(region)


async def test_release_ahead_of_the_push_refuses_it(table: HandleTable) -> None:
    table.release("h")
    with pytest.raises(TransferFailed, match="KV handle h was released"):
        table.open(HEADER, ignore)


async def test_a_handle_that_nobody_claims_expires(table: HandleTable, arena: StagingArena) -> None:
    await arrive(table, arena)
    await asyncio.sleep(1.5 * LEASE)
    assert arena.used == 0
    with pytest.raises(TransferFailed, match=r"KV handle h expired: nobody claimed it within 0\.3 s"):
        await claim(table)


async def test_every_claim_renews_the_lease_and_the_last_ends_it(table: HandleTable, arena: StagingArena) -> None:
    await arrive(table, arena, replace(HEADER, uses=2))
    await asyncio.sleep(0.6 * LEASE)
    first = await claim(table)
    await asyncio.sleep(0.6 * LEASE)
    second = await claim(table)
    await asyncio.sleep(1.5 * LEASE)
    assert arena.regions == 1
    first.close()
    second.close()


async def test_uses_that_never_come_do_not_keep_the_memory(table: HandleTable, arena: StagingArena) -> None:
    await arrive(table, arena, replace(HEADER, uses=2))
    claimed = await claim(table)
    await asyncio.sleep(1.5 * LEASE)
    assert arena.regions == 1
    claimed.close()


@pytest.mark.parametrize(
    ("header", "says"),
    [
        (replace(HEADER, fingerprint="llama/bf16"), "KV layouts differ"),
        (replace(HEADER, handle=""), "malformed"),
        (replace(HEADER, num_tokens=0), "malformed"),
        (replace(HEADER, num_bytes=0), "malformed"),
        (replace(HEADER, uses=0), "malformed"),
        (replace(HEADER, prompt_hash=b"short"), "malformed"),
    ],
)
async def test_refuses_headers_that_do_not_fit(table: HandleTable, header: KvHeader, says: str) -> None:
    with pytest.raises(TransferFailed, match=says):
        table.open(header, ignore)


async def test_a_handle_is_used_once(table: HandleTable, arena: StagingArena) -> None:
    await arrive(table, arena)
    with pytest.raises(TransferFailed, match="KV handle h is in use"):
        table.open(HEADER, ignore)
    (await claim(table)).close()
    with pytest.raises(TransferFailed, match="KV handle h is used up"):
        table.open(HEADER, ignore)


async def test_closing_frees_everything(table: HandleTable, arena: StagingArena) -> None:
    aborted: list[str] = []
    await arrive(table, arena, replace(HEADER, handle="ready"))
    await arrive(table, arena, replace(HEADER, handle="claimed"))
    claimed = await claim(table, "claimed")
    table.open(replace(HEADER, handle="arriving"), aborted.append)
    table.close()
    assert (table.open_handles, arena.used) == (0, 0)
    assert aborted == ["ended with its worker"]
    claimed.loaded()
    claimed.close()


async def test_what_is_remembered_is_bounded(table: HandleTable) -> None:
    for number in range(handles.REMEMBERED + 1):
        table.release(f"h{number}")
    with pytest.raises(TransferFailed, match="h0 is unknown"):
        await claim(table, "h0")
    with pytest.raises(TransferFailed, match="h1 was released"):
        await claim(table, "h1")


def test_the_prompt_hash_is_over_little_endian_uint32() -> None:
    assert hash_prompt([1, 258]) == hashlib.sha256(bytes([1, 0, 0, 0, 2, 1, 0, 0])).digest()
