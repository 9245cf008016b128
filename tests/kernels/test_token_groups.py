"""Grouping: every token with a slot is in exactly one tile of that slot, whatever the slots."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kernels.devices import DEVICE
from kernels.test_low_rank_delta import POPULARITIES, draw_slots
from preft_kernels._triton import by_kernel
from preft_kernels.token_groups import BASE, TILE, TokenGroups


def slots_of(groups: TokenGroups, tokens: int) -> list[int]:
    """Each token's slot, read from the tiles. Fails if a token is in two."""
    found = [BASE] * tokens
    order = groups.order.tolist()
    (tiles, taken, *_), *rows = groups.tiles.tolist()
    assert taken == sum(count for _, _, count, _ in rows[:tiles])
    for slot, start, count, _ in rows[:tiles]:
        assert count > 0
        assert not by_kernel(DEVICE) or count <= TILE
        of = order[start : start + count]
        assert of == sorted(of)
        for token in of:
            assert found[token] == BASE
            found[token] = slot
    return found


def ranks_of(groups: TokenGroups) -> set[tuple[int, int]]:
    (tiles, *_), *rows = groups.tiles.tolist()
    return {(slot, rank) for slot, _, _, rank in rows[:tiles]}


@pytest.mark.parametrize("popularity", POPULARITIES)
@pytest.mark.parametrize("tokens", [0, 1, 63, 64, 65, 300])
def test_every_token_is_in_one_tile_of_its_slot(popularity: str, tokens: int) -> None:
    slots = draw_slots(popularity, tokens, 40, torch.Generator().manual_seed(tokens))
    assert slots_of(TokenGroups.of(slots.to(DEVICE), 40, 4), tokens) == slots.tolist()


def test_a_smaller_step_leaves_nothing_of_a_larger_one() -> None:
    groups = TokenGroups(100, 3, 4, DEVICE)
    for slots in ([0] * 50 + [1] * 50, [2, BASE, 2], [BASE], [1] * 100, []):
        groups.set(np.array(slots, dtype=np.int64))
        assert slots_of(groups, len(slots)) == slots


def test_as_many_tiles_as_there_can_be() -> None:
    slots = np.arange(64) % 8
    groups = TokenGroups(64, 8, 4, DEVICE)
    groups.set(slots)
    assert slots_of(groups, 64) == slots.tolist()
    slots = np.repeat(np.arange(8) % 2, 8)  # runs that are just long enough to be worked on in place
    groups.set(slots)
    assert slots_of(groups, 64) == slots.tolist()


@pytest.mark.parametrize("kind", [np.int32, np.int64])
def test_any_negative_slot_is_the_base_model(kind: type) -> None:
    groups = TokenGroups(4, 2, 4, DEVICE)
    groups.set(np.array([-7, 1, -1, -(2**31)], dtype=kind))
    assert slots_of(groups, 4) == [BASE, 1, BASE, BASE]


def test_ranks_go_with_their_slots() -> None:
    groups = TokenGroups(8, 3, 16, DEVICE)
    slots = np.array([2, 0, 0, 1, 2, BASE, 1, 1])
    groups.set(slots)
    assert {rank for _, rank in ranks_of(groups)} == {16}
    groups.set(slots, np.array([4, 8, 9]))
    assert ranks_of(groups) == {(0, 8), (1, 8), (2, 16)}


@pytest.mark.parametrize(
    ("slots", "says"),
    [
        (np.zeros(9, dtype=int), "at most 8 tokens, got 9"),
        (np.array([0, 3]), "less than 3, got 3"),
        (np.zeros(4), "integers of one dimension"),
        (np.zeros((2, 2), dtype=int), "integers of one dimension"),
    ],
)
def test_wrong_slots_are_named(slots: np.ndarray, says: str) -> None:
    with pytest.raises(ValueError, match=f"slots must be .*{says}"):
        TokenGroups(8, 3, 4, DEVICE).set(slots)
