"""Low-rank delta: y[t] += scale * B[s_t] (A[s_t] x[t]) for every token t with a slot s_t >= 0. In place on y.

Owns the operation, its CPU implementation and its float32 reference. Doesn't know what a slot holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch

BASE = -1
"""Slot of tokens that no adapter touches."""

LONG_RUN = 8  # tokens: from here on a run is worked on in place, shorter ones of a slot are gathered into one product


def low_rank_delta_reference(
    y: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, slots: torch.Tensor, scale: float = 1.0
) -> torch.Tensor:
    """The definition, token by token in float32. Shapes as in `low_rank_delta_`; returns a new tensor."""
    out = y.float().clone()
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            out[token] += scale * (b[slot].float() @ (a[slot].float() @ x[token].float()))
    return out.to(y.dtype)


def spans_by_slot(slots: torch.Tensor) -> list[tuple[int, slice | torch.Tensor]]:
    """Each slot's tokens, for implementations on CPU; tokens without a slot are left out.

    A long run of tokens with one slot (a prompt's chunk) is a slice, worked on in place; the short ones of a slot are
    one tensor of indices, to be gathered. Every token is in one of them.
    """
    host = slots.numpy()
    borders = [0, *(np.flatnonzero(host[1:] != host[:-1]) + 1).tolist(), len(host)]
    spans: list[tuple[int, slice | torch.Tensor]] = []
    short: dict[int, list[torch.Tensor]] = {}
    for start, end in pairwise(borders):
        slot = int(host[start]) if end > start else BASE
        if slot < 0:
            continue
        if end - start >= LONG_RUN:
            spans.append((slot, slice(start, end)))
        else:
            short.setdefault(slot, []).append(torch.arange(start, end))
    return spans + [(slot, torch.cat(runs)) for slot, runs in short.items()]


def add_product_(
    y: torch.Tensor, tokens: slice | torch.Tensor, low: torch.Tensor, b: torch.Tensor, scale: float = 1.0
) -> None:
    """y[tokens] += scale * low b^T, in place. For implementations on CPU."""
    if isinstance(tokens, slice) and y.dtype == b.dtype:
        y[tokens].addmm_(low, b.T, alpha=scale)
    else:
        delta = torch.nn.functional.linear(low, b)
        y[tokens] += (delta * scale).to(y.dtype)


@torch.library.custom_op("preft::low_rank_delta_", mutates_args=("y",))
def _low_rank_delta(
    y: torch.Tensor,
    x: torch.Tensor,
    a: Sequence[torch.Tensor],
    b: Sequence[torch.Tensor],
    slots: torch.Tensor,
    offset: int,
    scale: float,
) -> None:
    for slot, tokens in spans_by_slot(slots):
        rows = x[tokens]
        left = offset
        for a_slice, b_slice in zip(a, b, strict=True):
            a_slot, b_slot = a_slice[slot], b_slice[slot]
            low = torch.nn.functional.linear(rows.to(a_slot.dtype), a_slot)
            add_product_(y[:, left : left + b_slot.shape[0]], tokens, low, b_slot, scale)
            left += b_slot.shape[0]


@_low_rank_delta.register_fake
def _(
    y: torch.Tensor,
    x: torch.Tensor,
    a: Sequence[torch.Tensor],
    b: Sequence[torch.Tensor],
    slots: torch.Tensor,
    offset: int,
    scale: float,
) -> None:
    return None


def low_rank_delta_(
    y: torch.Tensor,
    x: torch.Tensor,
    a: Sequence[torch.Tensor],
    b: Sequence[torch.Tensor],
    slots: torch.Tensor,
    *,
    offset: int = 0,
    scale: float = 1.0,
) -> None:
    """Adds each token's own low-rank delta to consecutive column slices of `y`, in place.

    y: [tokens, >= offset + sum of out_i], x: [tokens, in]; for each slice i: a[i]: [slots, rank, in],
    b[i]: [slots, out_i, rank]; slots: [tokens], integer, BASE (any negative) for tokens that stay as they are.
    Slice i covers columns offset + sum(out_j, j < i) onwards. Ranks smaller than the stacked one must be zero-padded.
    Raises ValueError naming the argument whose shape or type is wrong. (LoRA: Hu et al. 2021, arXiv 2106.09685, eq. 3.)
    """
    if y.dim() != 2 or x.dim() != 2 or x.shape[0] != y.shape[0]:
        raise ValueError(
            f"y and x must be [tokens, features] of equal length, got {tuple(y.shape)} and {tuple(x.shape)}"
        )
    if slots.shape != x.shape[:1] or slots.is_floating_point():
        raise ValueError(f"slots must be one integer per token ({x.shape[0]}), got {tuple(slots.shape)} {slots.dtype}")
    if len(a) != len(b) or not a:
        raise ValueError(f"a and b must have the same number of slices, at least one, got {len(a)} and {len(b)}")
    right = offset
    for index, (a_slice, b_slice) in enumerate(zip(a, b, strict=True)):
        if a_slice.dim() != 3 or a_slice.shape[2] != x.shape[1]:
            raise ValueError(f"a[{index}] must be [slots, rank, {x.shape[1]}], got {tuple(a_slice.shape)}")
        if b_slice.dim() != 3 or (b_slice.shape[0], b_slice.shape[2]) != (a_slice.shape[0], a_slice.shape[1]):
            slots_and_rank = f"{a_slice.shape[0]}, out, {a_slice.shape[1]}"
            raise ValueError(f"b[{index}] must be [{slots_and_rank}], got {tuple(b_slice.shape)}")
        right += b_slice.shape[1]
    if offset < 0 or right > y.shape[1]:
        raise ValueError(f"offset must leave room for the slices: columns {offset} to {right} of y's {y.shape[1]}")
    torch.ops.preft.low_rank_delta_(y, x, list(a), list(b), slots, offset, scale)
