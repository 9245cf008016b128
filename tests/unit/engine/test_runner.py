"""Taking over requests on vLLM's real batch and with its real sampler, without a model."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.lora.request import LoRARequest
from vllm.platforms import current_platform
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler
from vllm.v1.worker.gpu_input_batch import CachedRequestState, InputBatch

from preft.engine.runner import HandoverRunner, PromptRows, advance_generator
from preft.transfer.connector import OUTPUT_SO_FAR

CPU = torch.device("cpu")
VOCABULARY = 512


class Runner:
    """What the mixin finds in a vLLM runner."""

    def __init__(self) -> None:
        self.device = CPU
        self.requests: dict[str, CachedRequestState] = {}
        self.input_batch = InputBatch(8, 256, 256, CPU, VOCABULARY, [32], [8])
        self.reordered = 0

    def _may_reorder_batch(self, scheduler_output: Any) -> None:
        self.reordered += 1


class Handover(HandoverRunner, Runner):
    """Steps as `_update_states` makes them around the hook."""

    def add(self, name: str, prompt: list[int], computed: int, **sampling: Any) -> CachedRequestState:
        params = SamplingParams(**{"temperature": 0.0, **sampling})
        state = CachedRequestState(
            req_id=name,
            prompt_token_ids=prompt,
            mm_features=[],
            sampling_params=params,
            pooling_params=None,
            generator=None if params.seed is None else torch.Generator().manual_seed(params.seed),
            block_ids=([1],),
            num_computed_tokens=computed,
            output_token_ids=[],
        )
        self.requests[name] = state
        self.input_batch.add_request(state)
        return state

    def step(self, scheduled: dict[str, int], *new: SimpleNamespace) -> None:
        output = SimpleNamespace(scheduled_new_reqs=list(new), num_scheduled_tokens=scheduled)
        self.input_batch.condense()
        self._may_reorder_batch(output)
        self.input_batch.refresh_metadata()

    def row(self, name: str) -> int:
        return self.input_batch.req_id_to_index[name]


def new(name: str, output: tuple[int, ...] = ()) -> SimpleNamespace:
    """What the scheduler tells of a request once, in its first step."""
    extra = {OUTPUT_SO_FAR: list(output)} if output else None
    return SimpleNamespace(req_id=name, sampling_params=SamplingParams(extra_args=extra))


def test_tokens_made_elsewhere_become_output() -> None:
    runner = Handover()
    runner.add("other", [1, 2], 0)
    state = runner.add("a", [5, 6, 7], 3, presence_penalty=1.0)
    runner.step({"other": 2, "a": 2}, new("a", (8, 9)))
    batch, row = runner.input_batch, runner.row("a")
    assert state.output_token_ids == [8, 9]
    assert (state.num_tokens, batch.num_tokens_no_spec[row]) == (5, 5)
    assert batch.token_ids_cpu[row, :5].tolist() == [5, 6, 7, 8, 9]
    assert batch.is_token_ids[row, :5].all()
    assert batch.num_prompt_tokens[row] == 3
    assert batch.sampling_metadata.output_token_ids == [[], [8, 9]]  # what penalties count
    assert runner.requests["other"].output_token_ids == []
    assert runner.reordered == 1


def test_min_tokens_counts_them() -> None:
    """vLLM's own processor is told of a new request's output only by reference, after the hook."""
    runner = Handover()
    state = runner.add("a", [5, 6, 7], 3, min_tokens=3, stop_token_ids=[4])
    assert runner.input_batch.req_output_token_ids[runner.row("a")] is state.output_token_ids
    runner.step({"a": 2}, new("a", (8, 9)))
    assert runner.input_batch.req_output_token_ids[runner.row("a")] == [8, 9]


def test_requests_that_begin_here_have_no_output() -> None:
    runner = Handover()
    state = runner.add("a", [5, 6, 7], 0)
    runner.step({"a": 3}, new("a"))
    runner.step({"a": 1})
    assert state.output_token_ids == []
    assert runner.reordered == 2


def rows(computed: list[int], prompts: list[int], scheduled: list[int]) -> PromptRows:
    """Rows under adapters 1, 2, 0 (base), 1, ..."""
    mapping = np.array([(1, 2, 0)[i % 3] for i in range(len(prompts))])
    batch = SimpleNamespace(
        num_computed_tokens_cpu=np.array(computed),
        num_prompt_tokens=np.array(prompts),
        make_lora_inputs=lambda scheduled, sampled: (
            tuple(mapping.repeat(sampled)),
            tuple(mapping.repeat(scheduled)),
            {LoRARequest(f"l{i}", i, "/x") for i in (1, 2)},
        ),
    )
    return PromptRows(batch, np.array(scheduled))


def test_adapters_act_on_prompt_positions_alone() -> None:
    """A chunk that ends in the prompt, one over its end (a resumed request), base, and a row that decodes."""
    counts = np.array([3, 4, 2, 1])
    some = rows([0, 3, 0, 9], [5, 5, 2, 9], counts.tolist())
    assert some.positions.tolist() == [0, 1, 2, 3, 4, 5, 6, 0, 1, 9]
    assert some.prompts.tolist() == [5, 5, 5, 5, 5, 5, 5, 2, 2, 9]
    sampled, scheduled, acting = some.make_lora_inputs(counts, np.ones(4, dtype=np.int32))
    assert scheduled == (1, 1, 1, 2, 2, 0, 0, 0, 0, 0)
    assert sampled == (1, 0, 0, 0)  # a token sampled after output is the base model's
    assert {request.lora_int_id for request in acting} == {1, 2}


def test_the_last_prompt_position_still_has_its_adapter() -> None:
    sampled, scheduled, _ = rows([4], [5], [1]).make_lora_inputs(np.array([1]), np.array([1]))
    assert (sampled, scheduled) == ((1,), (1,))


def test_decoding_rows_need_no_slot() -> None:
    counts = np.array([1, 1])
    sampled, scheduled, acting = rows([5, 9], [5, 9], [1, 1]).make_lora_inputs(counts, counts)
    assert (sampled, scheduled, acting) == ((0, 0), (0, 0), set())


@pytest.mark.skipif(not current_platform.is_cpu(), reason="compares with the CPU sampler")
@pytest.mark.parametrize("draws", [1, 2, 7])
def test_a_generator_continues_where_one_engine_s_would_be(draws: int) -> None:
    current_platform.import_kernels()
    runner = Handover()
    state = runner.add("a", [5, 6, 7], 3, temperature=1.0, seed=42)
    runner.step({"a": draws}, new("a", tuple(range(draws))))
    one_engine = torch.Generator().manual_seed(42)
    logits = torch.randn(1, VOCABULARY)
    for _ in range(draws):
        TopKTopPSampler().forward_cpu(logits.clone(), {0: one_engine}, None, None)
    assert state.generator is not None
    assert torch.equal(state.generator.get_state(), one_engine.get_state())


def test_no_draws_leave_the_generator_alone() -> None:
    generator = torch.Generator().manual_seed(1)
    advance_generator(generator, 0, VOCABULARY, CPU)
    assert torch.equal(generator.get_state(), torch.Generator().manual_seed(1).get_state())


def test_only_the_last_chunk_draws() -> None:
    """vLLM winds a generator back after every other chunk, which ends the engine on CPU."""
    runner = Handover()
    state = runner.add("a", list(range(100)), 0, temperature=1.0, seed=1)
    other = runner.add("b", [5, 6], 0, temperature=1.0, seed=2)
    for computed in (0, 40):
        state.num_computed_tokens = computed
        runner.step({"a": 40, "b": 2})
        assert runner.input_batch.sampling_metadata.generators == {runner.row("b"): other.generator}
    state.num_computed_tokens = 80
    runner.step({"a": 20, "b": 2})
    assert runner.input_batch.sampling_metadata.generators == {
        runner.row("a"): state.generator,
        runner.row("b"): other.generator,
    }


def test_replayed_tokens_in_chunks_draw_at_their_end() -> None:
    runner = Handover()
    state = runner.add("a", [5, 6, 7], 3, temperature=1.0, seed=1)
    runner.step({"a": 30}, new("a", tuple(range(50))))
    assert runner.input_batch.sampling_metadata.generators == {}
    state.num_computed_tokens = 33
    runner.step({"a": 20})
    assert runner.input_batch.sampling_metadata.generators == {0: state.generator}


def test_rows_that_move_keep_their_own_generators() -> None:
    """Whatever comes, goes and is cut into chunks: a row's generator is its request's, or none before its end."""
    draw = random.Random(0)
    runner = Handover()
    names = iter(range(1000))
    for _ in range(300):
        while runner.requests and draw.random() < 0.3:
            name = draw.choice(list(runner.requests))
            runner.input_batch.remove_request(name)
            del runner.requests[name]
        while len(runner.requests) < 8 and draw.random() < 0.5:
            seed = draw.choice([None, draw.randrange(100)])
            runner.add(f"r{next(names)}", list(range(draw.randint(1, 100))), 0, temperature=1.0, seed=seed)
        scheduled = {
            name: min(40, state.num_tokens - state.num_computed_tokens) or 1 for name, state in runner.requests.items()
        }
        runner.step(scheduled)
        expected = {
            runner.row(name): state.generator
            for name, state in runner.requests.items()
            if state.generator is not None and state.num_computed_tokens + scheduled[name] >= state.num_tokens
        }
        assert runner.input_batch.sampling_metadata.generators == expected
        for name, state in runner.requests.items():
            state.num_computed_tokens = min(state.num_computed_tokens + scheduled[name], state.num_tokens)
