"""The KV connector between vLLM's real scheduler and cache tensors, without an engine.

What is loaded and saved when, and that nothing else is ever taken for a prompt's KV.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from vllm.v1.request import RequestStatus

from preft.core.cluster import Role
from preft.core.request import Sampling
from preft.engine.port import EngineRequest
from preft.memory.arena import Region, StagingArena
from preft.transfer.connector import BlockCopy, KvMetadata, StagedKvConnector, output_so_far
from preft.transfer.seal import SEAL, clear_seal, read_seal
from support.stepped_scheduler import BLOCK, BLOCKS, LAYERS, Side, generate, tokens_of


@pytest.fixture
def decode(model: Path, arena: StagingArena) -> Side:
    return Side(model, Role.DECODE, arena)


@pytest.fixture
def prefill(model: Path, arena: StagingArena) -> Side:
    return Side(model, Role.PREFILL, arena)


SAMPLING = Sampling(max_tokens=100, temperature=0.0)
REGION = Region(64, 4096, bytes(range(16)))


def handover(
    name: str, prompt: Sequence[int], output: Sequence[int] = (7,), *, salt: str = "s", max_tokens: int = 100
) -> EngineRequest:
    """A decode request. Where its KV lies doesn't matter to the scheduler."""
    sampling = dataclasses.replace(SAMPLING, max_tokens=max_tokens)
    return EngineRequest(name, tuple(prompt), sampling, output_token_ids=tuple(output), load=REGION, salt=salt)


# Decode, scheduler side


@pytest.mark.parametrize("length", [1, 31, 32, 33, 70])
@pytest.mark.parametrize("done", [1, 5, 40])
def test_loads_the_whole_prompt_and_computes_only_what_follows(decode: Side, length: int, done: int) -> None:
    prompt, output = tokens_of(length), tokens_of(done, seed=1)
    request = decode.add(handover("a", prompt, output))
    step, metadata = decode.schedule()
    (load,) = metadata.loads
    assert step.num_scheduled_tokens == {"a": done}
    assert step.scheduled_new_reqs[0].num_computed_tokens == length
    assert (len(load.block_ids), load.skip, load.num_tokens) == (-(-length // BLOCK), 0, length)
    assert output_so_far(step.scheduled_new_reqs[0].sampling_params) == list(output)
    assert load.region == REGION
    assert tuple(step.scheduled_new_reqs[0].block_ids[0][: len(load.block_ids)]) == load.block_ids
    assert (request.num_prompt_tokens, list(request.output_token_ids)) == (length, list(output))


def test_tokens_so_far_are_output_for_the_scheduler(decode: Side) -> None:
    """max_tokens counts them, the runner is told the prompt alone, and they are loaded once."""
    decode.add(handover("a", tokens_of(10), (1, 2, 3), max_tokens=5))
    step, _ = decode.schedule()
    assert step.scheduled_new_reqs[0].prompt_token_ids == list(tokens_of(10))
    decode.finish_step(step, {"a": 4})
    step, metadata = decode.schedule()
    assert metadata.loads == []
    assert step.num_scheduled_tokens == {"a": 1}
    decode.finish_step(step, {"a": 5})
    assert decode.scheduler.get_num_unfinished_requests() == 0


def test_a_request_without_kv_is_refused(decode: Side) -> None:
    request = dataclasses.replace(handover("a", tokens_of(10)), load=None)
    with pytest.raises(RuntimeError, match="takes no request without KV"):
        decode.add(request)


def test_what_is_in_the_prefix_cache_is_not_loaded_again(decode: Side) -> None:
    prompt = tokens_of(70)
    decode.add(handover("a", prompt))
    generate(decode, "a", [8])
    decode.add(handover("b", prompt))
    step, metadata = decode.schedule()
    (load,) = metadata.loads
    assert load.request_id == "b"
    assert (len(load.block_ids), load.skip) == (3, 2)
    assert step.num_scheduled_tokens == {"a": 1, "b": 1}


def test_a_prompt_that_is_cached_to_its_end_needs_no_load(decode: Side) -> None:
    prompt = tokens_of(64)
    decode.add(handover("a", prompt))
    generate(decode, "a", [8])
    decode.add(handover("b", prompt))
    step, metadata = decode.schedule()
    (load,) = metadata.loads
    assert load.skip == len(load.block_ids) == 2
    assert output_so_far(step.scheduled_new_reqs[0].sampling_params) == [7]  # the runner must still hear of them


def test_another_salt_shares_nothing(decode: Side) -> None:
    prompt = tokens_of(70)
    decode.add(handover("a", prompt))
    generate(decode, "a", [8])
    decode.add(handover("b", prompt, salt="another"))
    _, metadata = decode.schedule()
    assert metadata.loads[0].skip == 0


@pytest.mark.parametrize("length", [31, 32, 40])
def test_replayed_tokens_may_be_in_the_prefix_cache(decode: Side, length: int) -> None:
    """The request was here before: more than its prompt is cached."""
    prompt, output = tokens_of(length), tokens_of(40, seed=1)
    decode.add(handover("a", prompt, output[:1]))
    generate(decode, "a", output[1:])
    decode.scheduler.finish_requests("a", RequestStatus.FINISHED_ABORTED)
    decode.add(handover("b", prompt, output))
    step, metadata = decode.schedule()
    cached = (length + 39) // BLOCK * BLOCK
    assert step.scheduled_new_reqs[0].num_computed_tokens == cached > length
    assert step.num_scheduled_tokens == {"b": length + 40 - cached}
    (load,) = metadata.loads
    assert load.skip == len(load.block_ids)
    decode.finish_step(step, {"b": 9})


def test_a_preempted_request_loads_its_prompt_again(model: Path, arena: StagingArena) -> None:
    """Two requests grow until one must go; it comes back through the connector, its tokens recomputed as output."""
    decode = Side(model, Role.DECODE, arena, enable_prefix_caching=False)
    prompts = {"a": tokens_of(200, seed=1), "b": tokens_of(200, seed=2)}  # 7 blocks each, of 15
    for name, prompt in prompts.items():
        decode.add(handover(name, prompt))
    loads: list[BlockCopy] = []
    for _ in range(200):
        step, metadata = decode.schedule()
        loads += metadata.loads
        decode.finish_step(step, dict.fromkeys(step.num_scheduled_tokens, 8))
        if len(loads) > 2:
            break
    else:
        raise AssertionError("nothing was preempted")
    again = loads[2]
    assert (again.skip, again.num_tokens) == (0, 200)
    output = list(decode.scheduler.requests[again.request_id].output_token_ids)
    assert output[0] == 7
    assert set(output[1:]) == {8}
    assert step.num_scheduled_tokens[again.request_id] == len(output) - 1  # one came in that step


def test_a_failed_load_fails_its_request_alone(decode: Side) -> None:
    decode.add(handover("a", tokens_of(70)))
    decode.add(handover("b", tokens_of(70, seed=1)))
    step, metadata = decode.schedule()
    outputs = decode.finish_step(step, {"a": 8, "b": 8}, failed=metadata.loads[0].block_ids)
    assert {(output.request_id, str(output.finish_reason)) for output in outputs} == {("a", "error"), ("b", "None")}
    assert decode.scheduler.get_num_unfinished_requests() == 1


@pytest.mark.parametrize("aborted", [False, True])
def test_blocks_that_were_not_loaded_are_in_no_cache(decode: Side, aborted: bool) -> None:
    """Also if the request was aborted before the scheduler heard of it: what lies there is somebody else's KV."""
    prompt = tokens_of(70)
    decode.add(handover("a", prompt))
    step, metadata = decode.schedule()
    if aborted:
        decode.scheduler.finish_requests("a", RequestStatus.FINISHED_ABORTED)
    decode.finish_step(step, {"a": 8}, failed=metadata.loads[0].block_ids)
    decode.add(handover("b", prompt))
    _, metadata = decode.schedule()
    assert metadata.loads[0].skip == 0


def test_a_request_that_shares_blocks_with_a_failed_load_fails_too(decode: Side) -> None:
    prompt = tokens_of(64)
    decode.add(handover("a", prompt))
    decode.add(handover("b", prompt))
    step, metadata = decode.schedule()
    assert [load.skip for load in metadata.loads] == [0, 2]
    outputs = decode.finish_step(step, {"a": 8, "b": 8}, failed=metadata.loads[0].block_ids)
    assert {str(output.finish_reason) for output in outputs} == {"error"}


def test_finished_requests_are_forgotten(decode: Side) -> None:
    for end in ("abort", "tokens"):
        decode.add(handover(end, tokens_of(70), max_tokens=2))
        step, _ = decode.schedule()
        if end == "abort":
            decode.scheduler.finish_requests(end, RequestStatus.FINISHED_ABORTED)
        decode.finish_step(step, {end: 8})
    connector = decode.scheduler.get_kv_connector()
    assert isinstance(connector, StagedKvConnector)
    assert (connector._requests, connector._promised, connector._step_loads) == ({}, {}, [])


# Prefill, scheduler side


def prefilled(name: str, prompt: Sequence[int], save: Region | None = REGION) -> EngineRequest:
    return EngineRequest(name, tuple(prompt), SAMPLING, save=save)


@pytest.mark.parametrize("length", [1, 32, 33, 64])
def test_a_prompt_of_one_chunk_is_saved_in_its_step(prefill: Side, length: int) -> None:
    prefill.add(prefilled("a", tokens_of(length)))
    step, metadata = prefill.schedule()
    (save,) = metadata.saves
    assert (save.request_id, save.num_tokens, len(save.block_ids)) == ("a", length, -(-length // BLOCK))
    assert save.block_ids == tuple(step.scheduled_new_reqs[0].block_ids[0])
    assert save.region == REGION
    prefill.finish_step(step, {"a": 8})
    assert prefill.scheduler.get_num_unfinished_requests() == 0


def test_a_prompt_in_chunks_is_saved_after_the_last(prefill: Side) -> None:
    prefill.add(prefilled("a", tokens_of(130)))
    for last in (False, False, True):
        step, metadata = prefill.schedule()
        assert bool(metadata.saves) is last
        prefill.finish_step(step, {"a": 8} if last else {})
    assert len(metadata.saves[0].block_ids) == 5


def test_a_cached_prompt_is_saved_with_its_cached_blocks(prefill: Side) -> None:
    for name in ("a", "b"):
        prefill.add(prefilled(name, tokens_of(64)))
        step, metadata = prefill.schedule()
        assert len(metadata.saves[0].block_ids) == 2
        prefill.finish_step(step, {name: 8})
    assert step.num_scheduled_tokens == {"b": 32}


def test_choices_that_need_no_copy_are_not_saved(prefill: Side) -> None:
    prefill.add(prefilled("a", tokens_of(40), save=None))
    _, metadata = prefill.schedule()
    assert metadata.saves == []


# Worker side

SHAPES = [(BLOCKS, 2, BLOCK, 8), (2, BLOCKS, BLOCK, 1, 4)]  # blocks first as on CPU; keys and values first


async def reserved(arena: StagingArena, caches: dict[str, torch.Tensor], count: int) -> Region:
    size = sum(cache.nbytes // BLOCKS * count for cache in caches.values())
    region = await arena.reserve(size + SEAL.size, timeout=1)
    clear_seal(arena.view(region))
    return region


def blocks_of(cache: torch.Tensor, ids: Sequence[int]) -> torch.Tensor:
    return cache.index_select(0 if cache.shape[0] == BLOCKS else 1, torch.tensor(ids))


def step(connector: StagedKvConnector, metadata: KvMetadata) -> set[int]:
    """What the model runner does around a forward pass. Returns the blocks that couldn't be loaded."""
    connector.bind_connector_metadata(metadata)
    connector.start_load_kv(None)
    connector.wait_for_save()
    connector.clear_connector_metadata()
    return connector.get_block_ids_with_load_errors()


@pytest.mark.parametrize("shape", SHAPES)
async def test_blocks_arrive_as_they_were(prefill: Side, decode: Side, arena: StagingArena, shape: tuple[int]) -> None:
    """From any blocks to any others, those that are cached there left alone, and nothing besides touched."""
    sender, source = prefill.worker(*shape)
    receiver, target = decode.worker(*shape, 1)[0], decode.worker(*shape)[1]
    receiver.register_kv_caches(target)
    for cache in target.values():
        cache.mul_(-1)
    region = await reserved(arena, source, 3)
    assert step(sender, KvMetadata(saves=[BlockCopy("a", (9, 2, 5), 70, region)])) == set()
    assert read_seal(arena.view(region)) == 70
    before = {name: cache.clone() for name, cache in target.items()}
    assert step(receiver, KvMetadata(loads=[BlockCopy("b", (4, 11, 3), 70, region, skip=1)])) == set()
    for name in LAYERS:
        assert torch.equal(blocks_of(target[name], (11, 3)), blocks_of(source[name], (2, 5)))
        others = [block for block in range(BLOCKS) if block not in (11, 3)]
        assert torch.equal(blocks_of(target[name], others), blocks_of(before[name], others))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("wrong", ["released", "nonce", "unsealed", "tokens", "blocks"])
async def test_nothing_is_loaded_from_a_region_that_is_not_it(
    prefill: Side, decode: Side, arena: StagingArena, shape: tuple[int], wrong: str
) -> None:
    sender, source = prefill.worker(*shape)
    receiver, target = decode.worker(*shape)
    before = {name: cache.clone() for name, cache in target.items()}
    region = await reserved(arena, source, 2)
    step(sender, KvMetadata(saves=[BlockCopy("a", (9, 2), 50, region)]))
    load = BlockCopy("b", (4, 11), 50, region, skip=0)
    if wrong == "released":
        arena.release(region)
        await arena.reserve(region.size, timeout=1)  # and another's by now
    elif wrong == "nonce":
        load = dataclasses.replace(load, region=dataclasses.replace(region, nonce=bytes(16)))
    elif wrong == "unsealed":
        clear_seal(arena.view(region))
    elif wrong == "tokens":
        load = dataclasses.replace(load, num_tokens=51)
    else:
        load = dataclasses.replace(load, block_ids=(4, 11, 3))
    fine = BlockCopy("c", (5, 6), 50, region, skip=2)  # everything cached: needs no region
    assert step(receiver, KvMetadata(loads=[load, fine])) == set(load.block_ids)
    assert step(receiver, KvMetadata()) == set()  # reported once
    for name in LAYERS:
        assert torch.equal(target[name], before[name])


async def test_only_the_blocks_that_were_to_be_loaded_are_reported(decode: Side, arena: StagingArena) -> None:
    receiver, _ = decode.worker(*SHAPES[0])
    load = BlockCopy("b", (4, 11, 3), 70, Region(64, 4096, bytes(16)), skip=2)
    assert step(receiver, KvMetadata(loads=[load])) == {3}


async def test_the_block_that_stands_for_what_left_the_window_is_never_reported(
    decode: Side, arena: StagingArena
) -> None:
    """All requests of a sliding-window model have it: vLLM would fail every one of them."""
    receiver, _ = decode.worker(*SHAPES[0])
    assert step(
        receiver, KvMetadata(loads=[BlockCopy("b", (0, 0, 4, 3), 120, Region(64, 4096, bytes(16)), skip=1)])
    ) == {4, 3}


@pytest.mark.parametrize("wrong", ["released", "size"])
async def test_nothing_is_saved_into_a_region_that_is_not_it(prefill: Side, arena: StagingArena, wrong: str) -> None:
    sender, source = prefill.worker(*SHAPES[0])
    region = await reserved(arena, source, 2)
    arena.view(region)[:] = bytes(region.size)
    save = BlockCopy("a", (9, 2), 50, region)
    if wrong == "released":
        arena.release(region)
        region = await arena.reserve(region.size, timeout=1)
        assert region.offset == save.region.offset
    else:
        save = dataclasses.replace(save, block_ids=(9,), num_tokens=20)
    step(sender, KvMetadata(saves=[save]))
    assert bytes(arena.view(region)) == bytes(region.size)


def test_the_layout_tells_apart_what_can_not_be_exchanged(prefill: Side, decode: Side) -> None:
    layouts = {side.role: side.worker(*SHAPES[0])[0].describe() for side in (prefill, decode)}
    assert layouts[Role.PREFILL] == layouts[Role.DECODE]
    assert layouts[Role.DECODE]["block_bytes"] == len(LAYERS) * 2 * BLOCK * 8 * 4
    others = [
        decode.worker(BLOCKS, 2, BLOCK, 16)[0].describe()["layout"],
        decode.worker(2, BLOCKS, BLOCK, 8)[0].describe()["layout"],
    ]
    connector, caches = decode.worker(*SHAPES[0])
    connector.register_kv_caches({name: cache.to(torch.bfloat16) for name, cache in caches.items()})
    others.append(connector.describe()["layout"])
    assert len({layouts[Role.DECODE]["layout"], *others}) == 4


def test_a_cache_without_the_block_dimension_is_refused(decode: Side) -> None:
    with pytest.raises(ValueError, match="has no block dimension 16"):
        decode.worker(BLOCKS + 1, 2, BLOCK, 8)
