"""The operation against its float32 definition, over types, ranks, shapes and how adapters are spread over tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kernels.test_low_rank_delta import POPULARITIES, TOLERANCE, draw_slots
from preft_kernels.low_rank_delta import BASE
from preft_kernels.residual_delta import residual_delta_, residual_delta_reference


def arguments(slots: torch.Tensor, adapters: int, rank: int, features: int = 37, dtype: Any = torch.float32) -> Any:
    """hidden, residual, a, b, c, slots with values of spread about 1."""
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
    return (*(value.to(dtype) for value in values), slots)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("popularity", POPULARITIES)
@pytest.mark.parametrize("rank", [1, 3, 16])
def test_equals_the_definition(dtype: torch.dtype, popularity: str, rank: int) -> None:
    slots = draw_slots(popularity, 71, 9, torch.Generator().manual_seed(1))
    hidden, *rest = arguments(slots, 9, rank, dtype=dtype)
    expected = residual_delta_reference(hidden, *rest)
    before = [value.clone() for value in rest]
    residual_delta_(hidden, *rest)
    torch.testing.assert_close(hidden, expected, atol=3 * TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    assert all(torch.equal(value, old) for value, old in zip(rest, before, strict=True))


def test_tokens_without_a_slot_are_untouched() -> None:
    slots = torch.tensor([BASE, 1, BASE, -7, 0], dtype=torch.int32)
    hidden, *rest = arguments(slots, 2, 4)
    before = hidden.clone()
    residual_delta_(hidden, *rest)
    changed = (hidden != before).any(dim=1)
    assert changed.tolist() == [False, True, False, False, True]


def test_zero_padding_adds_nothing() -> None:
    slots = torch.tensor([0, 0, 0], dtype=torch.int32)
    hidden, residual, a, b, c, _ = arguments(slots, 1, 8)
    narrow = hidden.clone()
    residual_delta_(narrow, residual, a[:, :3].contiguous(), b[..., :3].contiguous(), c[:, :3].contiguous(), slots)
    a[:, 3:], b[..., 3:], c[:, 3:] = 0, 0, 0
    residual_delta_(hidden, residual, a, b, c, slots)
    torch.testing.assert_close(hidden, narrow)


def test_no_tokens() -> None:
    residual_delta_(*arguments(torch.empty(0, dtype=torch.int32), 2, 4))


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
    values = list(arguments(torch.zeros(5, dtype=torch.int32), 2, 4))
    values[place] = torch.zeros(shape)
    with pytest.raises(ValueError, match=says):
        residual_delta_(*values)


@pytest.mark.parametrize("slots", [torch.zeros(4, dtype=torch.int32), torch.zeros(5)])
def test_wrong_slots_are_named(slots: torch.Tensor) -> None:
    values = list(arguments(torch.zeros(5, dtype=torch.int32), 2, 4))
    values[5] = slots
    with pytest.raises(ValueError, match="slots must be"):
        residual_delta_(*values)


def test_is_a_well_formed_operator() -> None:
    """Its declared mutation and shapes are true: what torch.compile relies on."""
    slots = torch.tensor([0, BASE, 1], dtype=torch.int32)
    torch.library.opcheck(torch.ops.preft.residual_delta_.default, arguments(slots, 2, 4))
