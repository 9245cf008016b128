"""The operation against its float32 definition, over types, ranks, shapes and how adapters are spread over tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from kernels.devices import DEVICE
from kernels.test_low_rank_delta import POPULARITIES, TOLERANCE, draw_slots
from preft_kernels.residual_delta import residual_delta_, residual_delta_reference
from preft_kernels.token_groups import BASE, TokenGroups


def arguments(slots: torch.Tensor, adapters: int, rank: int, features: int = 37, dtype: Any = torch.float32) -> Any:
    """hidden, residual, a, b, c with values of spread about 1."""
    generator = torch.Generator().manual_seed(rank)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    tokens = len(slots)
    values = (
        random(tokens, features),
        random(tokens, features),
        random(adapters, rank, features) / features**0.5,
        random(adapters, features, rank) / rank**0.5,
        random(adapters, rank),
    )
    return tuple(value.to(DEVICE, dtype) for value in values)


def grouped(slots: torch.Tensor, adapters: int, rank: int) -> TokenGroups:
    return TokenGroups.of(slots.to(DEVICE), adapters, rank)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("popularity", POPULARITIES)
@pytest.mark.parametrize("rank", [1, 3, 16])
def test_equals_the_definition(dtype: torch.dtype, popularity: str, rank: int) -> None:
    slots = draw_slots(popularity, 71, 9, torch.Generator().manual_seed(1))
    hidden, *rest = arguments(slots, 9, rank, dtype=dtype)
    expected = residual_delta_reference(hidden, *rest, slots)
    before = [value.clone() for value in rest]
    residual_delta_(hidden, *rest, grouped(slots, 9, rank))
    torch.testing.assert_close(hidden, expected, atol=3 * TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    assert all(torch.equal(value, old) for value, old in zip(rest, before, strict=True))


def test_tokens_without_a_slot_are_untouched() -> None:
    slots = torch.tensor([BASE, 1, BASE, -7, 0], dtype=torch.int32)
    hidden, *rest = arguments(slots, 2, 4)
    before = hidden.clone()
    residual_delta_(hidden, *rest, grouped(slots, 2, 4))
    changed = (hidden != before).any(dim=1)
    assert changed.tolist() == [False, True, False, False, True]


def test_zero_padding_adds_nothing() -> None:
    slots = torch.tensor([0, 0, 0], dtype=torch.int32)
    hidden, residual, a, b, c = arguments(slots, 1, 8)
    narrow = hidden.clone()
    low = a[:, :3].contiguous(), b[..., :3].contiguous(), c[:, :3].contiguous()
    residual_delta_(narrow, residual, *low, grouped(slots, 1, 3))
    a[:, 3:], b[..., 3:], c[:, 3:] = 0, 0, 0
    residual_delta_(hidden, residual, a, b, c, grouped(slots, 1, 8))
    torch.testing.assert_close(hidden, narrow)


def test_no_tokens() -> None:
    none = torch.empty(0, dtype=torch.int32)
    residual_delta_(*arguments(none, 2, 4), grouped(none, 2, 4))


@pytest.mark.parametrize(
    ("place", "shape", "says"),
    [
        (0, (5, 36), "hidden and residual"),
        (1, (4, 37), "hidden and residual"),
        (2, (2, 4, 36), "a must be"),
        (3, (2, 36, 4), "b must be"),
        (3, (3, 37, 4), "b must be"),
        (4, (2, 5), "c must be"),
    ],
)
def test_wrong_shapes_are_named(place: int, shape: tuple[int, ...], says: str) -> None:
    slots = torch.zeros(5, dtype=torch.int32)
    values = list(arguments(slots, 2, 4))
    values[place] = torch.zeros(shape, device=DEVICE)
    with pytest.raises(ValueError, match=says):
        residual_delta_(*values, grouped(slots, 2, 4))


@pytest.mark.parametrize(("slots", "rank"), [(3, 4), (2, 5)])
def test_stacks_must_hold_what_the_groups_name(slots: int, rank: int) -> None:
    values = arguments(torch.zeros(5, dtype=torch.int32), 2, 4)
    with pytest.raises(ValueError, match=f"a must hold {slots} slots of rank {rank}"):
        residual_delta_(*values, TokenGroups(5, slots, rank, DEVICE))


def test_what_is_beyond_a_slot_s_rank_isn_t_read() -> None:
    slots = torch.tensor([0, 1, BASE, 1], dtype=torch.int32)
    hidden, residual, a, b, c = arguments(slots, 2, 24)
    ranks = np.array([5, 16])
    for slot, rank in enumerate(ranks):
        a[slot, rank:], b[slot, :, rank:], c[slot, rank:] = 0, 0, 0
    expected = residual_delta_reference(hidden, residual, a, b, c, slots)
    for slot, rank in enumerate((8, 16)):
        a[slot, rank:], b[slot, :, rank:], c[slot, rank:] = torch.nan, torch.nan, torch.nan
    groups = TokenGroups(4, 2, 24, DEVICE)
    groups.set(slots.numpy(), ranks)
    residual_delta_(hidden, residual, a, b, c, groups)
    torch.testing.assert_close(hidden, expected, rtol=1e-5, atol=1e-5)


def test_is_a_well_formed_operator() -> None:
    """Its declared mutation and shapes are true: what torch.compile relies on."""
    slots = torch.tensor([0, BASE, 1], dtype=torch.int32)
    groups = grouped(slots, 2, 4)
    torch.library.opcheck(
        torch.ops.preft.residual_delta_.default, (*arguments(slots, 2, 4), groups.order, groups.tiles)
    )
