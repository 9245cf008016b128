"""What isn't finite is found where it is written, and ends the one request that has it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from vllm.v1.engine import FinishReason

from preft.core.cluster import Role
from preft.core.request import AdapterRef, Sampling
from preft.engine.numbers import NOT_FINITE, BlockNumbers, bad_logits
from preft.engine.port import EngineRequest
from preft.memory.arena import StagingArena
from preft_kernels.kv_blocks import KvBlocks
from support.stepped_scheduler import BLOCK, Side, generate, tokens_of

NAN, INF = torch.nan, torch.inf
SIZE, BLOCKS = 4, 12


class Cache:
    """Two layers' blocks of SIZE tokens."""

    def __init__(self) -> None:
        self.layers = {f"layers.{number}": torch.zeros(BLOCKS, 2, SIZE, 8) for number in range(2)}
        self.numbers = BlockNumbers(KvBlocks(self.layers, BLOCKS), BLOCKS, SIZE, torch.device("cpu"))

    def write(self, block: int, value: float = NAN, token: int = 0) -> None:
        self.layers["layers.1"][block, 0, token, 5] = value

    def step(self, *requests: tuple[int, int, int, list[int]]) -> list[bool]:
        """Per request: tokens before, tokens after, tokens of its prompt, its blocks."""
        starts, ends, prompts = (np.array(column) for column in list(zip(*requests, strict=True))[:3])
        bad: list[bool] = self.numbers.bad_rows(starts, ends, prompts, [request[3] for request in requests]).tolist()
        return bad


def test_a_prompt_answers_for_its_blocks_alone() -> None:
    cache = Cache()
    cache.write(5, token=1)
    assert cache.step((0, 6, 6, [1, 2]), (0, 6, 6, [4, 5]), (0, 3, 3, [7])) == [False, True, False]


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_block_is_checked_when_it_is_full(value: float) -> None:
    """Not before: the first token's value is found at the fourth."""
    cache = Cache()
    cache.write(2, value)
    found = [cache.step((5 + i, 6 + i, 5, [1, 2])) for i in range(3)]
    assert found == [[False], [False], [True]]


def test_a_chunk_finds_it_before_the_prompt_is_done() -> None:
    cache = Cache()
    cache.write(3)
    assert cache.step((0, 10, 30, [1, 2, 3, 4])) == [False]  # the third block isn't full yet
    assert cache.step((10, 12, 30, [1, 2, 3, 4])) == [True]


def test_a_prompt_answers_for_blocks_that_others_have_made() -> None:
    """Found in the prefix cache: it was checked when its maker filled it."""
    cache = Cache()
    cache.write(1)
    assert cache.step((0, 8, 20, [1, 2])) == [True]
    assert cache.step((8, 10, 10, [1, 2, 3])) == [True]
    assert cache.step((8, 10, 10, [4, 2, 3])) == [False]


def test_zeroed_blocks_have_no_past() -> None:
    cache = Cache()
    cache.write(1)
    assert cache.step((0, 4, 4, [1])) == [True]
    cache.numbers.zero([1])
    assert not any(layer[1].any() for layer in cache.layers.values())
    assert cache.step((4, 5, 5, [1, 2])) == [False]


def test_nothing_is_checked_in_a_step_that_fills_no_block() -> None:
    cache = Cache()
    cache.write(2)
    assert cache.step((5, 6, 5, [1, 2]), (8, 9, 8, [3, 4, 5])) == [False, False]


@pytest.mark.parametrize("bad", [[0.0, NAN, 1.0], [0.0, INF, 1.0], [0.0, -INF, 1.0], [0.0, 0.0, 0.0]])
def test_logits_that_say_nothing(bad: list[float]) -> None:
    assert bad_logits(torch.tensor([[1.0, 2.0, 3.0], bad, [-1e38, 0.0, 1e38]])).tolist() == [False, True, False]


ADAPTER = AdapterRef("1", "d1" * 32, "/nowhere")


def ask(name: str, prompt: tuple[int, ...], adapter: AdapterRef | None = None) -> EngineRequest:
    return EngineRequest(name, prompt, Sampling(max_tokens=200, temperature=0.0), adapter=adapter)


@pytest.fixture
def side(model: Path, arena: StagingArena) -> Side:
    return Side(model, Role.COLOCATED, arena, max_num_batched_tokens=256)


def test_its_request_ends_without_the_token_and_others_go_on(side: Side) -> None:
    side.add(ask("a", tokens_of(40, 1), ADAPTER))
    side.add(ask("b", tokens_of(40, 2)))
    step, _ = side.schedule()
    outputs = {one.request_id: one for one in side.finish_step(step, {"a": 7, "b": 8}, not_finite=["a"])}
    assert (outputs["a"].new_token_ids, outputs["a"].finish_reason) == ([], FinishReason.ERROR)
    assert outputs["a"].stop_reason == NOT_FINITE
    assert (outputs["b"].new_token_ids, outputs["b"].finish_reason) == ([8], None)
    step, _ = side.schedule()
    assert dict(step.num_scheduled_tokens) == {"b": 1}
    assert step.finished_req_ids == {"a"}


def test_its_blocks_are_in_no_cache(side: Side) -> None:
    """Neither those of its prompt nor, later, of its output; another's equal prompt is computed anew."""
    prompt = tokens_of(2 * BLOCK + 5)
    side.add(ask("a", prompt, ADAPTER))
    step, _ = side.schedule()
    side.finish_step(step, {"a": 7})
    generate(side, "a", range(10, 10 + BLOCK))
    step, _ = side.schedule()
    side.finish_step(step, {"a": 3}, not_finite=["a"])
    side.add(ask("b", prompt, ADAPTER))
    step, _ = side.schedule()
    assert step.scheduled_new_reqs[0].num_computed_tokens == 0


def test_each_block_that_a_request_gets_is_named_for_zeroing(side: Side) -> None:
    """Also when it comes from a request that ended well, and again at each new block of output."""
    side.add(ask("a", tokens_of(BLOCK - 1)))
    step, _ = side.schedule()
    first = step.scheduled_new_reqs[0].block_ids[0]
    assert step.new_block_ids_to_zero == first
    side.finish_step(step, {"a": 7})
    step, _ = side.schedule()
    assert not step.new_block_ids_to_zero
    side.finish_step(step, {"a": 7})
    step, _ = side.schedule()
    assert step.new_block_ids_to_zero == step.scheduled_cached_reqs.new_block_ids[0][0]


@pytest.mark.parametrize("role", [Role.PREFILL, Role.DECODE])
def test_every_role_zeroes(model: Path, arena: StagingArena, role: Role) -> None:
    assert Side(model, role, arena).scheduler.needs_kv_cache_zeroing
