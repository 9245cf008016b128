"""Residual delta: the ReFT form h' = h + B[s] (A[s] h + c[s]) on the residual stream h = hidden + residual.

The module owns the operation, its CPU implementation and its float32 reference; its Triton kernel is the low-rank
delta's. Decoder layers return the stream as two addends, and only `hidden` changes. (LoReFT and DiReFT: Wu et al. 2024,
arXiv 2404.03592, sections 3.2 and 3.3. With R, W, b as trained, LoReFT is A = W - R, B = R^T, c = b; DiReFT is A = W,
B = R^T, c = b.)
"""

from __future__ import annotations

import torch

from preft_kernels._triton import by_kernel
from preft_kernels.low_rank_delta import add_product_, launch_delta
from preft_kernels.token_groups import TokenGroups, tiles_on_cpu


def residual_delta_reference(
    hidden: torch.Tensor,
    residual: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    slots: torch.Tensor,
) -> torch.Tensor:
    """The definition, token by token in float32. Returns the new `hidden`.

    Shapes as in `residual_delta_`; slots: [tokens], negative for none.
    """
    out = hidden.float().clone()
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            stream = hidden[token].float() + residual[token].float()
            out[token] += b[slot].float() @ (a[slot].float() @ stream + c[slot].float())
    return out.to(hidden.dtype)


@torch.library.custom_op("preft::residual_delta_", mutates_args=("hidden",))
def _residual_delta(
    hidden: torch.Tensor,
    residual: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    order: torch.Tensor,
    tiles: torch.Tensor,
) -> None:
    if by_kernel(hidden.device):
        launch_delta(hidden, hidden, [a], [b], order, tiles, addend=residual, c=c)
        return
    for slot, tokens, rank in tiles_on_cpu(order, tiles):
        stream = hidden[tokens] + residual[tokens]
        low = torch.addmm(c[slot, :rank], stream.to(a.dtype), a[slot, :rank].T)
        add_product_(hidden, tokens, low, b[slot, :, :rank].T)


@_residual_delta.register_fake
def _(
    hidden: torch.Tensor,
    residual: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    order: torch.Tensor,
    tiles: torch.Tensor,
) -> None:
    return None


def residual_delta_(
    hidden: torch.Tensor,
    residual: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    groups: TokenGroups,
) -> None:
    """Adds each token's own delta to `hidden`, in place; `residual` is read only.

    hidden, residual: [tokens, features]; a: [slots, rank, features]; b: [slots, features, rank]; c: [slots, rank].
    `groups` maps tokens to slots, and has the slots' ranks. From a slot's rank up to the next multiple of RANK_STEP, a,
    b and c must be zero. Tokens without a slot are neither read nor written. Types and roundings are as in
    `low_rank_delta_`. Raises ValueError, naming the argument with a wrong shape.
    """
    if hidden.dim() != 2 or residual.shape != hidden.shape:
        raise ValueError(
            f"hidden and residual must be [tokens, features] alike, got {tuple(hidden.shape)}, {tuple(residual.shape)}"
        )
    features = hidden.shape[1]
    if a.dim() != 3 or a.shape[2] != features:
        raise ValueError(f"a must be [slots, rank, {features}], got {tuple(a.shape)}")
    if a.shape[0] < groups.slots or a.shape[1] < groups.rank:
        raise ValueError(f"a must hold {groups.slots} slots of rank {groups.rank}, got {tuple(a.shape)}")
    if b.shape != (a.shape[0], features, a.shape[1]):
        raise ValueError(f"b must be [{a.shape[0]}, {features}, {a.shape[1]}], got {tuple(b.shape)}")
    if c.shape != a.shape[:2]:
        raise ValueError(f"c must be [{a.shape[0]}, {a.shape[1]}], got {tuple(c.shape)}")
    torch.ops.preft.residual_delta_(hidden, residual, a, b, c, groups.order, groups.tiles)
