"""Residual delta: the ReFT form h' = h + B[s] (A[s] h + c[s]) on the residual stream h = hidden + residual.

Owns the operation, its CPU implementation and its float32 reference. Decoder layers hand on the stream as two addends,
of which only `hidden` is changed. (LoReFT and DiReFT: Wu et al. 2024, arXiv 2404.03592, sections 3.2 and 3.3: with R,
W, b as trained, LoReFT is A = W - R, B = R^T, c = b; DiReFT is A = W, B = R^T, c = b.)
"""

from __future__ import annotations

import torch

from preft_kernels.low_rank_delta import add_product_, spans_by_slot


def residual_delta_reference(
    hidden: torch.Tensor,
    residual: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    slots: torch.Tensor,
) -> torch.Tensor:
    """The definition, token by token in float32. Shapes as in `residual_delta_`; returns the new `hidden`."""
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
    slots: torch.Tensor,
) -> None:
    for slot, tokens in spans_by_slot(slots):
        stream = hidden[tokens] + residual[tokens]
        low = torch.nn.functional.linear(stream.to(a.dtype), a[slot], c[slot])
        add_product_(hidden, tokens, low, b[slot])


@_residual_delta.register_fake
def _(
    hidden: torch.Tensor,
    residual: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    slots: torch.Tensor,
) -> None:
    return None


def residual_delta_(
    hidden: torch.Tensor,
    residual: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    slots: torch.Tensor,
) -> None:
    """Adds each token's own delta to `hidden`, in place; `residual` is read only.

    hidden, residual: [tokens, features]; a: [slots, rank, features]; b: [slots, features, rank]; c: [slots, rank];
    slots: [tokens], integer, any negative for tokens that stay as they are. Ranks smaller than the stacked one must be
    zero-padded in all three. Raises ValueError naming the argument whose shape or type is wrong.
    """
    if hidden.dim() != 2 or residual.shape != hidden.shape:
        raise ValueError(
            f"hidden and residual must be [tokens, features] alike, got {tuple(hidden.shape)}, {tuple(residual.shape)}"
        )
    tokens, features = hidden.shape
    if slots.shape != (tokens,) or slots.is_floating_point():
        raise ValueError(f"slots must be one integer per token ({tokens}), got {tuple(slots.shape)} {slots.dtype}")
    if a.dim() != 3 or a.shape[2] != features:
        raise ValueError(f"a must be [slots, rank, {features}], got {tuple(a.shape)}")
    if b.shape != (a.shape[0], features, a.shape[1]):
        raise ValueError(f"b must be [{a.shape[0]}, {features}, {a.shape[1]}], got {tuple(b.shape)}")
    if c.shape != a.shape[:2]:
        raise ValueError(f"c must be [{a.shape[0]}, {a.shape[1]}], got {tuple(c.shape)}")
    torch.ops.preft.residual_delta_(hidden, residual, a, b, c, slots)
