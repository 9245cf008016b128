"""Our punica wrapper under vLLM's own metadata: each token under its own adapter, base tokens under none."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from vllm.config.lora import LoRAConfig
from vllm.lora.layers import LoRAMapping

from kernels.test_token_groups import slots_of as grouped
from preft.adapters.formats.reft_config import EVERY, ReftConfig
from preft.engine.lora import GroupedPunicaWrapper
from preft.engine.reft import ReftLayer
from preft_kernels.low_rank_delta import low_rank_delta_reference
from preft_kernels.token_groups import BASE

SLOTS = 3
IDS = [101, 102, None]  # which adapter is in which slot
TOKENS = 16
INPUTS, RANK = 12, 4


@pytest.fixture
def wrapper() -> GroupedPunicaWrapper:
    return GroupedPunicaWrapper(TOKENS, max_batches=TOKENS, device="cpu", slots=SLOTS, rank=RANK)


def stacks(*outputs: int, seed: int = 0) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """A and B as vLLM keeps them: [slots, 1, rank, in] and [slots, 1, out, rank], for each slice."""
    generator = torch.Generator().manual_seed(seed)
    a = tuple(torch.randn(SLOTS, 1, RANK, INPUTS, generator=generator) for _ in outputs)
    return a, tuple(torch.randn(SLOTS, 1, size, RANK, generator=generator) for size in outputs)


def batch(wrapper: GroupedPunicaWrapper, tokens: list[int], sampled: list[int]) -> None:
    """`tokens` and `sampled` are adapter ids, 0 for the base model, as the model runner gives them."""
    mapping = LoRAMapping(tuple(tokens), tuple(sampled), is_prefill=True)
    wrapper.update_metadata(mapping, IDS, SLOTS + 1, 512)


def slots_of(tokens: list[int]) -> torch.Tensor:
    return torch.tensor([BASE if token == 0 else IDS.index(token) for token in tokens])


MIXED = [101, 101, 0, 102, 0, 0, 102, 101]


@pytest.mark.parametrize("tokens", [MIXED, [0, 0, 0], [102], [0, 101]])
def test_linear_layers(wrapper: GroupedPunicaWrapper, tokens: list[int]) -> None:
    batch(wrapper, MIXED, MIXED)  # what an earlier step has left
    batch(wrapper, tokens, tokens)
    a, b = stacks(6, 3)
    x, y = torch.randn(len(tokens), INPUTS), torch.randn(len(tokens), 9)
    before = y.clone()
    wrapper.add_lora_linear(y, x, a, b, 0.5, (6, 3))
    slots = slots_of(tokens)
    for part, a_slice, b_slice in ((slice(0, 6), a[0], b[0]), (slice(6, 9), a[1], b[1])):
        expected = low_rank_delta_reference(before[:, part], x, a_slice[:, 0], b_slice[:, 0], slots, 0.5)
        torch.testing.assert_close(y[:, part], expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(y[slots == BASE], before[slots == BASE])
    assert not torch.allclose(y[slots != BASE], before[slots != BASE]) or not (slots != BASE).any()


def test_the_output_layer_acts_on_rows_that_are_sampled_under_its_adapters(wrapper: GroupedPunicaWrapper) -> None:
    """Four requests: one prompt of each adapter, of which one has such a LoRA, the base model's, and one's output."""
    wrapper.hold(0, RANK, None, head_rank=3)
    wrapper.hold(1, RANK, None)
    batch(wrapper, MIXED, MIXED)
    batch(wrapper, [101, 101, 102, 0, 0], [101, 102, 0, 0])
    a, b = stacks(20)
    a[0][:, :, 3:] = 0
    b[0][..., 3:] = 0
    x, y = torch.randn(4, INPUTS), torch.randn(4, 22)  # the vocabulary may be padded
    before = y.clone()
    wrapper.add_lora_logits(y, x, a, b, 1.0)
    assert torch.equal(y[1:], before[1:])
    assert torch.equal(y[0, 20:], before[0, 20:])
    torch.testing.assert_close(y[0, :20], before[0, :20] + b[0][0, 0] @ (a[0][0, 0] @ x[0]), rtol=1e-4, atol=1e-4)
    wrapper.hold(0, RANK, None)  # another adapter has come into the slot
    batch(wrapper, [101, 101], [101])
    y = before.clone()
    wrapper.add_lora_logits(y[:1], x[:1], a, b, 1.0)
    assert torch.equal(y, before)


def test_three_dimensional_batches(wrapper: GroupedPunicaWrapper) -> None:
    batch(wrapper, MIXED, MIXED)
    a, b = stacks(6)
    x, y = torch.randn(1, len(MIXED), INPUTS), torch.randn(1, len(MIXED), 6)
    expected = low_rank_delta_reference(y[0], x[0], a[0][:, 0], b[0][:, 0], slots_of(MIXED))
    wrapper.add_lora_linear(y, x, a, b, 1.0, (6,))
    torch.testing.assert_close(y[0], expected, rtol=1e-4, atol=1e-4)


def test_padding_after_the_batch_is_the_base_model_s(wrapper: GroupedPunicaWrapper) -> None:
    """A compiled graph may run over more rows than the batch has; those of an earlier batch mustn't count."""
    batch(wrapper, [101] * TOKENS, [101])
    batch(wrapper, [102, 102], [102])
    a, b = stacks(6)
    x, y = torch.randn(TOKENS, INPUTS), torch.randn(TOKENS, 6)
    before = y.clone()
    wrapper.add_lora_linear(y, x, a, b, 1.0, (6,))
    assert torch.equal(y[2:], before[2:])
    assert not torch.allclose(y[:2], before[:2])


@pytest.mark.parametrize("name", ["add_shrink", "add_expand", "apply_lora_full_linear", "add_lora_embedding"])
def test_what_is_not_served_says_so(wrapper: GroupedPunicaWrapper, name: str) -> None:
    call: Any = getattr(wrapper, name)
    with pytest.raises(NotImplementedError):
        call()


def hold(wrapper: GroupedPunicaWrapper, first: list[int], last: list[int], lora: tuple[bool, ...]) -> None:
    """What is in the slots: where both positions are 0 there is no ReFT."""
    for slot, positions in enumerate(zip(first, last, strict=True)):
        reft = ReftConfig("loreft", RANK, (0,), *positions) if any(positions) else None
        wrapper.hold(slot, RANK if lora[slot] else 0, reft)


def limit(
    wrapper: GroupedPunicaWrapper,
    spans: list[tuple[int, int, int]],
    first: list[int],
    last: list[int],
    lora: tuple[bool, ...] = (True, True, True),
) -> None:
    """`spans`: per request the first token's position, the number of tokens, the prompt's length."""
    hold(wrapper, first, last, lora)
    positions = np.concatenate([np.arange(start, start + count) for start, count, _ in spans])
    from_end = np.repeat([prompt for _, _, prompt in spans], [count for _, count, _ in spans]) - positions
    wrapper.limit(positions, from_end)


def test_reft_acts_on_the_positions_of_its_adapter_only(wrapper: GroupedPunicaWrapper) -> None:
    """A whole prompt of 6 under f2+l1, a middle chunk and a last chunk of prompts under the same, one of the base."""
    tokens = [101] * 6 + [101] * 3 + [101] * 2 + [0] * 2
    batch(wrapper, tokens, tokens)
    assert grouped(wrapper.reft, len(tokens)) == slots_of(tokens).tolist()  # until limits are known
    limit(wrapper, [(0, 6, 6), (1, 3, 9), (7, 2, 9), (0, 2, 2)], [2, EVERY, EVERY], [1, 0, 0])
    assert grouped(wrapper.reft, len(tokens)) == [0, 0, -1, -1, -1, 0, 0, -1, -1, -1, 0, -1, -1]
    assert grouped(wrapper.lora, len(tokens)) == slots_of(tokens).tolist()  # a LoRA acts on all of them


def test_a_reft_alone_costs_no_lora(wrapper: GroupedPunicaWrapper) -> None:
    """Linear layers skip its tokens, decoder layers don't; and so again in a step with the same mapping."""
    tokens = [101] * 2 + [102] * 2
    hold(wrapper, [EVERY, 0, 0], [0, 0, 0], lora=(False, True, True))
    batch(wrapper, tokens, tokens)
    for start in (0, 2):
        limit(wrapper, [(start, 2, 9), (start, 2, 9)], [EVERY, 0, 0], [0, 0, 0], lora=(False, True, True))
        assert grouped(wrapper.lora, len(tokens)) == [-1, -1, *slots_of(tokens)[2:].tolist()]
        assert grouped(wrapper.reft, len(tokens)) == [0, 0, -1, -1]
    hold(wrapper, [0, 0, 0], [0, 0, 0], lora=(True, True, True))  # another adapter has come into the slot
    batch(wrapper, tokens, tokens)
    assert grouped(wrapper.lora, len(tokens)) == slots_of(tokens).tolist()
    assert grouped(wrapper.reft, len(tokens)) == [BASE] * len(tokens)


def test_limits_are_taken_anew_when_only_positions_have_moved(wrapper: GroupedPunicaWrapper) -> None:
    batch(wrapper, [102] * 4, [102])
    for start, expected in ((0, [1, 1, 1, -1]), (4, [-1] * 4), (8, [-1, -1, 1, 1])):
        limit(wrapper, [(start, 4, 12)], [0, 3, 0], [0, 2, 0])
        assert grouped(wrapper.reft, 4) == expected


def test_an_adapter_without_reft_acts_on_no_stream(wrapper: GroupedPunicaWrapper) -> None:
    batch(wrapper, MIXED, MIXED)
    limit(wrapper, [(0, len(MIXED), len(MIXED))], [0, EVERY, 0], [0, 0, 0])
    assert grouped(wrapper.reft, len(MIXED)) == [1 if token == 102 else -1 for token in MIXED]
    assert set(grouped(wrapper.reft, TOKENS)[len(MIXED) :]) == {BASE}


def test_a_reft_layer_adds_to_the_stream_what_its_slot_holds(wrapper: GroupedPunicaWrapper) -> None:
    base = torch.nn.Module()
    base.input_layernorm = torch.nn.LayerNorm(INPUTS)
    hidden, residual = torch.randn(len(MIXED), INPUTS), torch.randn(len(MIXED), INPUTS)
    base.forward = lambda positions: (hidden.clone(), residual.clone())
    layer = ReftLayer("model.layers.0", base, SLOTS, LoRAConfig(max_lora_rank=8, lora_dtype=torch.float32))
    layer.set_mapping(wrapper)
    a, b = torch.randn(3, INPUTS + 1), torch.randn(INPUTS, 3)
    layer.set_reft(1, torch.randn(8, INPUTS), torch.randn(INPUTS, 8), torch.randn(8))  # an earlier one of higher rank
    layer.set_reft(1, a[:, :-1], b, a[:, -1])
    batch(wrapper, MIXED, MIXED)
    changed, same = layer(positions=None)
    delta = ((hidden + residual) @ a[:, :-1].T + a[:, -1]) @ b.T
    of_102 = torch.tensor([token == 102 for token in MIXED])
    torch.testing.assert_close(changed, torch.where(of_102[:, None], hidden + delta, hidden), rtol=1e-4, atol=1e-4)
    assert torch.equal(same, residual)
    layer.reset_lora(1)
    assert torch.equal(layer(positions=None)[0], hidden)
