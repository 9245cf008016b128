"""Low-rank delta: y[t] += scale * B[s_t] (A[s_t] x[t]) for every token t with a slot s_t >= 0. In place on y.

The module owns the operation: its Triton kernel, its CPU implementation and its float32 reference. The content of a
slot is the caller's. The residual delta uses the same kernel: x may be the sum of two tensors, and a bias c[s_t] may be
added to A[s_t] x[t].
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch

from preft_kernels._triton import INTERPRETED, by_kernel, tl, triton
from preft_kernels.blocks import Blocks, Work, choose
from preft_kernels.token_groups import RANK_STEP, TILE, TokenGroups, tiles_on_cpu

MOST_SLICES = 3  # per launch: q, k and v
FUSED, SHRINK, EXPAND = (tl.constexpr(phase) for phase in range(3)) if tl else range(3)
"""The phase of a launch: both products, or one of them."""


def low_rank_delta_reference(
    y: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, slots: torch.Tensor, scale: float = 1.0
) -> torch.Tensor:
    """The definition, token by token in float32, for one slice. Returns a new tensor.

    y: [tokens, out], x: [tokens, in], a: [slots, rank, in], b: [slots, out, rank], slots: [tokens], negative for none.
    """
    out = y.float().clone()
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            out[token] += scale * (b[slot].float() @ (a[slot].float() @ x[token].float()))
    return out.to(y.dtype)


@triton.jit
def _dot(a, b, WIDE: tl.constexpr):  # type: ignore[no-untyped-def]
    if WIDE:  # the interpreter can't multiply bfloat16
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _expand(  # type: ignore[no-untyped-def]
    y, low, b, slot, rank, r, tokens, real, width, left, y_row, y_column, b_slot, b_row, b_column, first, step,
    BLOCK_N: tl.constexpr, WIDE: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """y[tokens, left + n] += B[slot][n] low, for every `step`-th block of columns n < width from block `first` on.

    `AHEAD` is the number of prefetched blocks of y; None if the same program may have just written them.
    """
    for block in tl.range(first, tl.cdiv(width, BLOCK_N), step, num_stages=AHEAD):
        n = block * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = n < width
        weights = tl.load(
            b + slot * b_slot + n[None, :] * b_row + r[:, None] * b_column,
            mask=inside[None, :] & (r < rank)[:, None],
            other=0.0,
        )
        at = y + tokens[:, None] * y_row + (left + n)[None, :] * y_column
        mask = real[:, None] & inside[None, :]
        delta = _dot(low.to(weights.dtype), weights, WIDE)
        tl.store(at, (tl.load(at, mask=mask, other=0.0).to(tl.float32) + delta).to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["most_tokens"])
def delta_kernel(  # type: ignore[no-untyped-def]
    y, x, addend, a0, a1, a2, b0, b1, b2, c, low, order, tiles,
    width, n0, n1, n2, left, scale, most_tokens,
    y_row, y_column, x_row, x_column, addend_row, addend_column,
    a_slot, a_row, a_column, b0_slot, b1_slot, b2_slot, b_row, b_column, c_slot,
    PHASE: tl.constexpr, SLICES: tl.constexpr, ADDEND: tl.constexpr, BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    SPLITS: tl.constexpr, TILE: tl.constexpr, RANK: tl.constexpr, RANK_STEP: tl.constexpr, WIDE: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Processes pieces of tiles: BLOCK_M tokens of one slot, shrunk to the rank in registers and expanded from there.

    With few pieces, the columns of y are split into parts, and each part's program computes the shrink again (FUSED).
    Alternatively the shrink is a separate launch (SHRINK), whose programs take a piece and a part of the inputs each.
    Their sums go to `low`, [SPLITS, most_tokens, SLICES * RANK_PADDED] float32, for the next launch (EXPAND).
    """
    RANK_PADDED: tl.constexpr = (RANK + BLOCK_R - 1) // BLOCK_R * BLOCK_R
    AHEAD: tl.constexpr = STAGES if RANK <= BLOCK_R else None
    programs = tl.num_programs(0)
    many = tl.load(tiles)
    full = tl.maximum(many, tl.cdiv(tl.load(tiles + 1), BLOCK_M))  # least number of pieces with tokens
    if PHASE == SHRINK:
        parts = SPLITS
    elif PHASE == FUSED and ADDEND:
        parts = 1  # y may be x: one program reads it, and then writes it
    else:
        parts = tl.cdiv(tl.maximum(n0, tl.maximum(n1, n2)), BLOCK_N)
        parts = tl.minimum(parts, tl.maximum(programs // tl.maximum(full, 1), 1))
    for item in range(tl.program_id(0), many * (TILE // BLOCK_M) * parts, programs):
        part = item % parts
        piece = item // parts
        row = tiles + (1 + piece % many) * 4
        begin = piece // many * BLOCK_M
        count = tl.load(row + 2) - begin
        if count > 0:
            slot = tl.load(row).to(tl.int64)
            rank = tl.minimum(tl.load(row + 3), RANK)
            if RANK % RANK_STEP == 0:
                rank = tl.multiple_of(rank, RANK_STEP)  # allows wide reads of B
            m = tl.arange(0, BLOCK_M)
            real = m < count
            places = tl.load(row + 1) + begin + m
            tokens = tl.load(order + places, mask=real, other=0).to(tl.int64)
            sums = low + places.to(tl.int64)[:, None] * (SLICES * RANK_PADDED)
            a_split = most_tokens.to(tl.int64) * (SLICES * RANK_PADDED)
            for r0 in range(0, rank, BLOCK_R):
                r = r0 + tl.arange(0, BLOCK_R)
                ranked = r < rank
                low0 = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
                low1 = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
                low2 = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
                if PHASE == EXPAND:
                    for split in tl.static_range(SPLITS):
                        at = sums + split * a_split + r[None, :]
                        low0 += tl.load(at, mask=real[:, None], other=0.0)
                        if SLICES > 1:
                            low1 += tl.load(at + RANK_PADDED, mask=real[:, None], other=0.0)
                        if SLICES > 2:
                            low2 += tl.load(at + 2 * RANK_PADDED, mask=real[:, None], other=0.0)
                else:
                    first = 0
                    last = width
                    if PHASE == SHRINK:
                        share = tl.cdiv(tl.cdiv(width, BLOCK_K), SPLITS) * BLOCK_K
                        first = part * share
                        last = tl.minimum(first + share, width)
                    for k0 in range(first, last, BLOCK_K):
                        k = k0 + tl.arange(0, BLOCK_K)
                        inside = k < width
                        mask = real[:, None] & inside[None, :]
                        rows = tl.load(x + tokens[:, None] * x_row + k[None, :] * x_column, mask=mask, other=0.0)
                        if ADDEND:
                            at = addend + tokens[:, None] * addend_row + k[None, :] * addend_column
                            rows = rows.to(tl.float32) + tl.load(at, mask=mask, other=0.0).to(tl.float32)
                        at = slot * a_slot + r[None, :] * a_row + k[:, None] * a_column
                        mask = inside[:, None] & ranked[None, :]
                        weights = tl.load(a0 + at, mask=mask, other=0.0)
                        rows = rows.to(weights.dtype)
                        low0 += _dot(rows, weights, WIDE)
                        if SLICES > 1:
                            low1 += _dot(rows, tl.load(a1 + at, mask=mask, other=0.0), WIDE)
                        if SLICES > 2:
                            low2 += _dot(rows, tl.load(a2 + at, mask=mask, other=0.0), WIDE)
                if PHASE == SHRINK:
                    at = sums + part * a_split + r[None, :]
                    tl.store(at, low0, mask=real[:, None])
                    if SLICES > 1:
                        tl.store(at + RANK_PADDED, low1, mask=real[:, None])
                    if SLICES > 2:
                        tl.store(at + 2 * RANK_PADDED, low2, mask=real[:, None])
                else:
                    if BIAS:
                        low0 += tl.load(c + slot * c_slot + r, mask=ranked, other=0.0).to(tl.float32)[None, :]
                    _expand(
                        y, low0 * scale, b0, slot, rank, r, tokens, real, n0, left,
                        y_row, y_column, b0_slot, b_row, b_column, part, parts, BLOCK_N, WIDE, AHEAD,
                    )  # fmt: skip
                    if SLICES > 1:
                        _expand(
                            y, low1 * scale, b1, slot, rank, r, tokens, real, n1, left + n0,
                            y_row, y_column, b1_slot, b_row, b_column, part, parts, BLOCK_N, WIDE, AHEAD,
                        )  # fmt: skip
                    if SLICES > 2:
                        _expand(
                            y, low2 * scale, b2, slot, rank, r, tokens, real, n2, left + n0 + n1,
                            y_row, y_column, b2_slot, b_row, b_column, part, parts, BLOCK_N, WIDE, AHEAD,
                        )  # fmt: skip


def launch_delta(
    y: torch.Tensor,
    x: torch.Tensor,
    a: Sequence[torch.Tensor],
    b: Sequence[torch.Tensor],
    order: torch.Tensor,
    tiles: torch.Tensor,
    offset: int = 0,
    scale: float = 1.0,
    addend: torch.Tensor | None = None,
    c: torch.Tensor | None = None,
    blocks: Blocks | None = None,
) -> None:
    """Launches the kernel for all slices, as few times as their strides allow.

    Shapes are those of the calling operation. With an addend, y may be x. `blocks` is for measurements; by default the
    shapes choose the blocks.
    """
    tokens, rank = len(y), a[0].shape[1]
    if not tokens:
        return
    left = offset
    for first, last in _launches(a, b):
        widths = [piece.shape[1] for piece in b[first:last]]
        work = Work(
            x.shape[1], sum(widths), last - first, rank, 1 << (tokens - 1).bit_length(), addend is not None,
            y.element_size(),
        )  # fmt: skip
        cut = blocks or choose(work, device_name(y.device), processors(y.device))
        a3 = [*a[first:last], *[a[first]] * (MOST_SLICES - (last - first))]
        b3 = [*b[first:last], *[b[first]] * (MOST_SLICES - (last - first))]
        plus, bias = x if addend is None else addend, a[0] if c is None else c
        padded = -(-rank // cut.r) * cut.r * (last - first)
        low = y if not cut.splits else y.new_empty(cut.splits * tokens * padded, dtype=torch.float32)
        for phase in (SHRINK, EXPAND) if cut.splits else (FUSED,):
            delta_kernel[(cut.programs * processors(y.device),)](
                y, x, plus, *a3, *b3, bias, low, order, tiles,
                x.shape[1], *(widths + [0] * MOST_SLICES)[:MOST_SLICES], left, scale, tokens,
                *y.stride(), *x.stride(), *plus.stride(),
                *a[first].stride(), *(piece.stride(0) for piece in b3), *b[first].stride()[1:], bias.stride(0),
                PHASE=phase, SLICES=last - first, ADDEND=addend is not None, BIAS=c is not None,
                BLOCK_M=cut.m, BLOCK_K=cut.k, BLOCK_N=cut.n, BLOCK_R=cut.r, SPLITS=cut.splits,
                TILE=TILE, RANK=rank, RANK_STEP=RANK_STEP, WIDE=INTERPRETED, STAGES=cut.stages,
                num_warps=cut.warps, num_stages=cut.stages,
            )  # fmt: skip
        left += sum(widths)


@cache
def processors(device: torch.device) -> int:
    """Number of a GPU's multiprocessors; 2 for Triton's interpreter, so that a program takes several pieces."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


@cache
def device_name(device: torch.device) -> str:
    return str(torch.cuda.get_device_name(device)) if device.type == "cuda" else device.type


def _launches(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> list[tuple[int, int]]:
    """Ranges of neighbouring slices for one launch each: at most MOST_SLICES, of equal strides and types."""

    def kind(index: int) -> object:
        return a[index].stride(), b[index].stride()[1:], a[index].dtype, b[index].dtype

    starts = [0]
    for index in range(1, len(a)):
        if index - starts[-1] == MOST_SLICES or kind(index) != kind(starts[-1]):
            starts.append(index)
    return list(zip(starts, [*starts[1:], len(a)], strict=True))


def add_product_(
    y: torch.Tensor, tokens: slice | torch.Tensor, low: torch.Tensor, bt: torch.Tensor, scale: float = 1.0
) -> None:
    """y[tokens] += scale * low bt, in place. For CPU implementations."""
    if isinstance(tokens, slice) and y.dtype == bt.dtype:
        y[tokens].addmm_(low, bt, alpha=scale)
    else:
        y[tokens] += (torch.mm(low, bt) * scale).to(y.dtype)


@torch.library.custom_op("preft::low_rank_delta_", mutates_args=("y",))
def _low_rank_delta(
    y: torch.Tensor,
    x: torch.Tensor,
    a: Sequence[torch.Tensor],
    b: Sequence[torch.Tensor],
    order: torch.Tensor,
    tiles: torch.Tensor,
    offset: int,
    scale: float,
) -> None:
    if by_kernel(y.device):
        launch_delta(y, x, a, b, order, tiles, offset, scale)
        return
    work = [(slot, tokens, rank, x[tokens].to(a[0].dtype)) for slot, tokens, rank in tiles_on_cpu(order, tiles)]
    if not work:
        return
    left = offset
    for a_slice, b_slice in zip(a, b, strict=True):
        part = y[:, left : left + b_slice.shape[1]]
        a_of, b_of = a_slice.transpose(1, 2).unbind(0), b_slice.transpose(1, 2).unbind(0)
        for slot, tokens, rank, rows in work:
            low = torch.mm(rows, a_of[slot][:, :rank])
            add_product_(part, tokens, low, b_of[slot][:rank], scale)
        left += b_slice.shape[1]


@_low_rank_delta.register_fake
def _(
    y: torch.Tensor,
    x: torch.Tensor,
    a: Sequence[torch.Tensor],
    b: Sequence[torch.Tensor],
    order: torch.Tensor,
    tiles: torch.Tensor,
    offset: int,
    scale: float,
) -> None:
    return None


def low_rank_delta_(
    y: torch.Tensor,
    x: torch.Tensor,
    a: Sequence[torch.Tensor],
    b: Sequence[torch.Tensor],
    groups: TokenGroups,
    *,
    offset: int = 0,
    scale: float = 1.0,
) -> None:
    """Adds each token's own low-rank delta to consecutive column slices of `y`, in place.

    y: [tokens, >= offset + sum of out_i], x: [tokens, in]; for each slice i: a[i]: [slots, rank, in], b[i]: [slots,
    out_i, rank]. Slice i covers columns offset + sum(out_j, j < i) onwards. `groups` maps tokens to slots, and has the
    slots' ranks. From a slot's rank up to the next multiple of RANK_STEP, a[i] and b[i] must be zero. Tokens without a
    slot are neither read nor written. Types: float32, bfloat16 and float16. Products are summed in float32, and A[s] x
    is rounded to b's type in between. Raises ValueError, naming the argument with a wrong shape. (LoRA: Hu et al. 2021,
    arXiv 2106.09685, eq. 3.)
    """
    if y.dim() != 2 or x.dim() != 2 or x.shape[0] != y.shape[0]:
        raise ValueError(
            f"y and x must be [tokens, features] of equal length, got {tuple(y.shape)} and {tuple(x.shape)}"
        )
    if len(a) != len(b) or not a:
        raise ValueError(f"a and b must have the same number of slices, at least one, got {len(a)} and {len(b)}")
    right = offset
    for index, (a_slice, b_slice) in enumerate(zip(a, b, strict=True)):
        stack = (*a[0].shape[:2], x.shape[1])
        if a_slice.dim() != 3 or a_slice.shape != stack:
            raise ValueError(f"a[{index}] must be [slots, rank, {x.shape[1]}] like a[0], got {tuple(a_slice.shape)}")
        if stack[0] < groups.slots or stack[1] < groups.rank:
            raise ValueError(f"a[{index}] must hold {groups.slots} slots of rank {groups.rank}, got {stack}")
        if b_slice.dim() != 3 or (b_slice.shape[0], b_slice.shape[2]) != stack[:2]:
            raise ValueError(f"b[{index}] must be [{stack[0]}, out, {stack[1]}], got {tuple(b_slice.shape)}")
        right += b_slice.shape[1]
    if offset < 0 or right > y.shape[1]:
        raise ValueError(f"offset must leave room for the slices: columns {offset} to {right} of y's {y.shape[1]}")
    torch.ops.preft.low_rank_delta_(y, x, list(a), list(b), groups.order, groups.tiles, offset, scale)
