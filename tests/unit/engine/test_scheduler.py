"""A colocated engine's scheduler: adapters for prompts alone, in slots, after preemption and in the prefix cache."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from vllm.v1.request import RequestStatus

from preft.core.cluster import Role
from preft.core.request import AdapterRef, Sampling
from preft.engine.port import EngineRequest
from preft.memory.arena import StagingArena
from support.readable_ref import ReadableRef
from support.stepped_scheduler import BLOCK, Side, generate, tokens_of

ALICE, BOB, CAROL = (ReadableRef(name, f"digest-{name}", "/nowhere") for name in "123")


@pytest.fixture
def side(model: Path, arena: StagingArena) -> Side:
    return Side(model, Role.COLOCATED, arena, max_loras=2, max_num_batched_tokens=256)


def ask(name: str, prompt: tuple[int, ...], adapter: AdapterRef | None, output: tuple[int, ...] = ()) -> EngineRequest:
    sampling = Sampling(max_tokens=200, temperature=0.0)
    return EngineRequest(name, prompt, sampling, adapter=adapter, output_token_ids=output)


def cached(side: Side, request: EngineRequest) -> int:
    """Tokens of `request` that are in the prefix cache. It is let go of again."""
    probe = side.add(dataclasses.replace(request, request_id="probe"))
    step, _ = side.schedule()
    found = step.scheduled_new_reqs[0].num_computed_tokens
    side.finish_step(step, {})
    side.scheduler.finish_requests(probe.request_id, RequestStatus.FINISHED_ABORTED)
    return found


def test_a_request_needs_a_slot_for_its_prompt_alone(side: Side) -> None:
    """Two slots: the third adapter waits for a step, not for the others' output."""
    for name, adapter in (("a", ALICE), ("b", BOB), ("c", CAROL)):
        side.add(ask(name, tokens_of(40), adapter))
    step, _ = side.schedule()
    assert list(step.num_scheduled_tokens) == ["a", "b"]
    assert [new.lora_request.lora_int_id for new in step.scheduled_new_reqs] == [1, 2]
    side.finish_step(step, {"a": 7, "b": 7})
    step, _ = side.schedule()
    assert dict(step.num_scheduled_tokens) == {"a": 1, "b": 1, "c": 40}
    assert [new.lora_request.lora_int_id for new in step.scheduled_new_reqs] == [3]


def test_a_prompt_in_chunks_keeps_its_slot_until_its_last(model: Path, arena: StagingArena) -> None:
    side = Side(model, Role.COLOCATED, arena, max_loras=1)  # 64 tokens a step
    first = side.add(ask("a", tokens_of(100), ALICE))
    side.add(ask("b", tokens_of(10), BOB))
    step, _ = side.schedule()
    assert dict(step.num_scheduled_tokens) == {"a": 64}
    assert first.lora_request is not None
    side.finish_step(step, {})
    step, _ = side.schedule()
    assert dict(step.num_scheduled_tokens) == {"a": 36}
    side.finish_step(step, {"a": 7})
    step, _ = side.schedule()
    assert dict(step.num_scheduled_tokens) == {"a": 1, "b": 10}


def test_a_preempted_request_gets_its_adapter_back(model: Path, arena: StagingArena) -> None:
    side = Side(model, Role.COLOCATED, arena, max_num_batched_tokens=512)  # 15 blocks of 32
    requests = [side.add(ask(name, tokens_of(200, seed=i), ALICE)) for i, name in enumerate("ab")]
    while not any(request.num_preemptions for request in requests):
        step, _ = side.schedule()
        side.finish_step(step, dict.fromkeys(step.num_scheduled_tokens, 7))
    (lost,) = (request for request in requests if request.num_preemptions)
    (other,) = (request for request in requests if request is not lost)
    assert lost.lora_request is not None
    assert lost.lora_request.lora_name == ALICE.digest
    assert other.lora_request is None
    side.scheduler.finish_requests(other.request_id, RequestStatus.FINISHED_ABORTED)
    step, _ = side.schedule()
    side.finish_step(step, {lost.request_id: 7})
    assert lost.num_computed_tokens == lost.num_tokens - 1
    assert lost.lora_request is None


def test_the_next_turn_meets_the_prompt_s_blocks_and_no_output(side: Side) -> None:
    prompt = tokens_of(2 * BLOCK + 6)
    side.add(ask("a", prompt, ALICE))
    generate(side, "a", [7] * (3 * BLOCK))
    turn = (*prompt, *([7] * (3 * BLOCK)))
    assert cached(side, ask("turn", turn, ALICE)) == 2 * BLOCK
    assert cached(side, ask("turn", turn, BOB)) == 0
    assert cached(side, ask("turn", turn, None)) == 0


def test_the_base_model_s_next_turn_meets_all_of_it(side: Side) -> None:
    """There is no border in what one model made: this is vLLM's own prefix cache."""
    prompt = tokens_of(2 * BLOCK + 6)
    side.add(ask("a", prompt, None))
    generate(side, "a", [7] * (3 * BLOCK))
    assert cached(side, ask("turn", (*prompt, *([7] * (3 * BLOCK))), None)) == 5 * BLOCK


def test_a_request_that_begins_with_output_meets_its_like_alone(side: Side) -> None:
    """Its output's blocks are hashed as what they are, from the first one on."""
    prompt, output = tokens_of(2 * BLOCK), (7,) * (2 * BLOCK + 1)
    request = side.add(ask("a", prompt, ALICE, output))
    assert (request.num_prompt_tokens, tuple(request.output_token_ids)) == (len(prompt), output)
    generate(side, "a", [7])
    assert cached(side, ask("like", prompt, ALICE, output)) == 4 * BLOCK
    assert cached(side, ask("turn", (*prompt, *output), ALICE)) == 2 * BLOCK
    shorter = ask("shorter", prompt[:-1], ALICE, (prompt[-1], *output))  # equal tokens, another border
    assert cached(side, shorter) == BLOCK


def test_finished_requests_are_forgotten(side: Side) -> None:
    side.add(ask("a", tokens_of(40), ALICE))
    generate(side, "a", [7])
    side.scheduler.finish_requests("a", RequestStatus.FINISHED_ABORTED)
    side.add(ask("b", tokens_of(40), ALICE))
    side.scheduler.finish_requests("b", RequestStatus.FINISHED_ABORTED)
    assert side.scheduler._adapters == {}
