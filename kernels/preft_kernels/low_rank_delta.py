"""Low-rank delta: y[t] += scale * B[s_t] (A[s_t] x[t]) for every token t with a slot s_t >= 0. In place on y.

Owns the operation: its Triton kernel, its CPU implementation and its float32 reference. Doesn't know what a slot holds.
The kernel is the residual delta's as well: x may come as two addends, and a bias c[s_t] may be added to A[s_t] x[t].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from preft_kernels._triton import INTERPRETED, by_kernel, tl, triton
from preft_kernels.token_groups import RANK_STEP, TILE, TokenGroups, tiles_on_cpu

MOST_SLICES = 3  # of one launch: q, k and v


def low_rank_delta_reference(
    y: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, slots: torch.Tensor, scale: float = 1.0
) -> torch.Tensor:
    """The definition, token by token in float32. One slice; returns a new tensor.

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
    BLOCK_N: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """y[tokens, left + n] += B[slot][n] low, for every `step`-th block of columns n < width from block `first` on."""
    for block in range(first, tl.cdiv(width, BLOCK_N), step):
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


@triton.jit
def delta_kernel(  # type: ignore[no-untyped-def]
    y, x, addend, a0, a1, a2, b0, b1, b2, c, order, tiles,
    width, n0, n1, n2, left, scale,
    y_row, y_column, x_row, x_column, addend_row, addend_column,
    a_slot, a_row, a_column, b0_slot, b1_slot, b2_slot, b_row, b_column, c_slot,
    SLICES: tl.constexpr, ADDEND: tl.constexpr, BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    RANK: tl.constexpr, RANK_STEP: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One tile of one slot's tokens: shrunk to rank in registers, expanded from there. Programs: tile, part of columns.

    Each part computes the shrink anew, so that few tokens still make many programs; x comes from cache then.
    """
    row = tiles + tl.program_id(0) * 4
    slot = tl.load(row).to(tl.int64)
    if slot >= 0:
        start = tl.load(row + 1)
        count = tl.load(row + 2)
        rank = tl.minimum(tl.load(row + 3), RANK)
        if RANK % RANK_STEP == 0:
            rank = tl.multiple_of(rank, RANK_STEP)  # then B can be read in wide words
        m = tl.arange(0, BLOCK_M)
        real = m < count
        tokens = tl.load(order + start + m, mask=real, other=0).to(tl.int64)
        for r0 in range(0, rank, BLOCK_R):
            r = r0 + tl.arange(0, BLOCK_R)
            ranked = r < rank
            low0 = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
            low1 = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
            low2 = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
            for k0 in range(0, width, BLOCK_K):
                k = k0 + tl.arange(0, BLOCK_K)
                inside = k < width
                mask = real[:, None] & inside[None, :]
                rows = tl.load(x + tokens[:, None] * x_row + k[None, :] * x_column, mask=mask, other=0.0)
                if ADDEND:
                    places = addend + tokens[:, None] * addend_row + k[None, :] * addend_column
                    rows = rows.to(tl.float32) + tl.load(places, mask=mask, other=0.0).to(tl.float32)
                places = slot * a_slot + r[None, :] * a_row + k[:, None] * a_column
                mask = inside[:, None] & ranked[None, :]
                weights = tl.load(a0 + places, mask=mask, other=0.0)
                rows = rows.to(weights.dtype)
                low0 += _dot(rows, weights, WIDE)
                if SLICES > 1:
                    low1 += _dot(rows, tl.load(a1 + places, mask=mask, other=0.0), WIDE)
                if SLICES > 2:
                    low2 += _dot(rows, tl.load(a2 + places, mask=mask, other=0.0), WIDE)
            if BIAS:
                low0 += tl.load(c + slot * c_slot + r, mask=ranked, other=0.0).to(tl.float32)[None, :]
            first = tl.program_id(1)
            step = tl.num_programs(1)
            _expand(
                y, low0 * scale, b0, slot, rank, r, tokens, real, n0, left,
                y_row, y_column, b0_slot, b_row, b_column, first, step, BLOCK_N, WIDE,
            )  # fmt: skip
            if SLICES > 1:
                _expand(
                    y, low1 * scale, b1, slot, rank, r, tokens, real, n1, left + n0,
                    y_row, y_column, b1_slot, b_row, b_column, first, step, BLOCK_N, WIDE,
                )  # fmt: skip
            if SLICES > 2:
                _expand(
                    y, low2 * scale, b2, slot, rank, r, tokens, real, n2, left + n0 + n1,
                    y_row, y_column, b2_slot, b_row, b_column, first, step, BLOCK_N, WIDE,
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
) -> None:
    """Launches the kernel for all slices, as few times as their strides allow. Shapes as in the operations that do.

    With an addend, y may be x: then one program does all columns of its tokens, after it has read them.
    """
    tokens, slots, rank = y.shape[0], a[0].shape[0], a[0].shape[1]
    grid_tiles = min(-(-tokens // TILE) + slots, tokens)
    if not grid_tiles:
        return
    wide = y.element_size() > 2
    block_r = min(max(16, triton.next_power_of_2(rank)), 32 if wide else 64)
    if addend is not None:
        block_r = max(16, triton.next_power_of_2(rank))
    block_k = (64 if wide else 128) if block_r <= 64 else 32
    block_n = 64 if block_r <= 64 else 32
    left = offset
    for first, last in _launches(a, b):
        widths = [piece.shape[1] for piece in b[first:last]]
        parts = 1 if addend is not None else _parts(y.device, tokens, max(widths), block_n)
        a3 = [*a[first:last], *[a[first]] * (MOST_SLICES - (last - first))]
        b3 = [*b[first:last], *[b[first]] * (MOST_SLICES - (last - first))]
        plus, bias = x if addend is None else addend, a[0] if c is None else c
        delta_kernel[(grid_tiles, parts)](
            y, x, plus, *a3, *b3, bias, order, tiles,
            x.shape[1], *(widths + [0] * MOST_SLICES)[:MOST_SLICES], left, scale,
            *y.stride(), *x.stride(), *plus.stride(),
            *a[first].stride(), *(piece.stride(0) for piece in b3), *b[first].stride()[1:], bias.stride(0),
            SLICES=last - first, ADDEND=addend is not None, BIAS=c is not None,
            BLOCK_M=TILE, BLOCK_K=block_k, BLOCK_N=block_n, BLOCK_R=block_r,
            RANK=rank, RANK_STEP=RANK_STEP, WIDE=INTERPRETED,
        )  # fmt: skip
        left += sum(widths)


def _launches(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> list[tuple[int, int]]:
    """Which neighbouring slices one launch can do: MOST_SLICES at most, of equal strides and types."""

    def kind(index: int) -> object:
        return a[index].stride(), b[index].stride()[1:], a[index].dtype, b[index].dtype

    starts = [0]
    for index in range(1, len(a)):
        if index - starts[-1] == MOST_SLICES or kind(index) != kind(starts[-1]):
            starts.append(index)
    return list(zip(starts, [*starts[1:], len(a)], strict=True))


def _parts(device: torch.device, tokens: int, columns: int, block_n: int) -> int:
    """Into how many programs a tile's columns are split: as many as fill the device twice."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
    return max(1, min(-(-columns // block_n), 2 * processors // -(-tokens // TILE)))


def add_product_(
    y: torch.Tensor, tokens: slice | torch.Tensor, low: torch.Tensor, bt: torch.Tensor, scale: float = 1.0
) -> None:
    """y[tokens] += scale * low bt, in place. For implementations on CPU."""
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

    y: [tokens, >= offset + sum of out_i], x: [tokens, in]; for each slice i: a[i]: [slots, rank, in],
    b[i]: [slots, out_i, rank]. Slice i covers columns offset + sum(out_j, j < i) onwards. `groups` says which token is
    under which slot, and what ranks the slots hold; beyond, up to a multiple of RANK_STEP, a[i] and b[i] must be zero.
    Tokens without a slot are neither read nor written. float32, bfloat16 and float16; products are summed in float32,
    and A[s] x is rounded to b's type in between. Raises ValueError naming the argument whose shape is wrong.
    (LoRA: Hu et al. 2021, arXiv 2106.09685, eq. 3.)
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
