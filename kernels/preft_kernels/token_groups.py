"""Groups a step's tokens by slot, once per step on the host, for all kernels of that step.

The module owns the grouping and its buffers. The content of a slot is the caller's.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch

from preft_kernels._triton import by_kernel

BASE = -1
"""Slot of tokens without an adapter."""

TILE = 64  # tokens of one slot that are adjacent for GPU kernels
RANK_STEP = 8  # tiles' ranks are rounded up to a multiple of this
LONG_RUN = 8  # tokens: on CPU a run of this length is processed in place; shorter runs are gathered into one product


class TokenGroups:
    """A step's tokens by slot, in buffers of fixed size and address, so that compiled and captured graphs can use them.

    `order`: [max_tokens] int32, the tokens that have a slot; those of a tile are adjacent and ascending.
    `tiles`: [1 + max_tiles, 4] int32. The first row has the numbers of tiles and of tokens. Each further row is a tile:
    slot, start in `order`, number of tokens, and the rank of the slot's content, rounded up to a multiple of RANK_STEP.
    On GPU a tile has at most TILE tokens. On CPU a tile is a long run of neighbours (a prompt's chunk), or all other
    tokens of a slot.
    """

    def __init__(self, max_tokens: int, slots: int, rank: int, device: torch.device | str = "cpu") -> None:
        """`rank` is the highest rank. All slots have it until `set` is called with other ranks."""
        self.slots = slots
        self.rank = rank
        self._group = _tiles if by_kernel(device) else _runs
        self._on_cpu = torch.device(device).type == "cpu"
        longest = TILE if by_kernel(device) else LONG_RUN
        self._host_order = self._buffer(max_tokens, pinned=not self._on_cpu)
        most = -(-max_tokens // longest) + min(slots, max_tokens)
        self._host_tiles = self._buffer(1 + most, 4, pinned=not self._on_cpu)
        self.order = self._host_order if self._on_cpu else self._host_order.to(device)
        self.tiles = self._host_tiles if self._on_cpu else self._host_tiles.to(device)

    @classmethod
    def of(cls, slots: torch.Tensor, count: int, rank: int) -> TokenGroups:
        """Groups of these tokens: `slots` has one slot per token, less than `count`."""
        groups = cls(len(slots), count, rank, slots.device)
        groups.set(slots.cpu().numpy())
        return groups

    @staticmethod
    def _buffer(*shape: int, pinned: bool) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.int32, pin_memory=pinned)

    def set(self, slots: np.ndarray, ranks: np.ndarray | None = None) -> None:
        """Takes a step's tokens. `slots`: [tokens], negative for none; `ranks`: [slots], ranks of the slots' content.

        On GPU the copies are queued on the current stream, and kernels launched later see them. The caller first waits
        for the last step's copies, as vLLM's input preparation does. Raises ValueError if a slot or the number of
        tokens exceeds the buffers.
        """
        if slots.ndim != 1 or slots.dtype.kind != "i":
            raise ValueError(f"slots must be integers of one dimension, got {slots.dtype} {slots.shape}")
        if len(slots) > len(self._host_order):
            raise ValueError(f"slots must be of at most {len(self._host_order)} tokens, got {len(slots)}")
        if slots.max(initial=BASE) >= self.slots:
            raise ValueError(f"slots must be less than {self.slots}, got {slots.max()}")
        order, tiles = self._group(slots)
        tiles[:, 3] = -(-(self.rank if ranks is None else ranks[tiles[:, 0]]) // RANK_STEP) * RANK_STEP
        self._host_order.numpy()[: len(order)] = order
        self._host_tiles.numpy()[0, :2] = len(tiles), len(order)
        self._host_tiles.numpy()[1 : 1 + len(tiles)] = tiles
        if not self._on_cpu:
            self.order.copy_(self._host_order, non_blocking=True)
            self.tiles.copy_(self._host_tiles, non_blocking=True)


def tiles_on_cpu(order: torch.Tensor, tiles: torch.Tensor) -> list[tuple[int, slice | torch.Tensor, int]]:
    """Each tile's slot, its tokens (neighbours as a slice) and its rank. For CPU implementations."""
    places, rows = order.numpy(), tiles.numpy()
    found: list[tuple[int, slice | torch.Tensor, int]] = []
    for slot, start, count, rank in rows[1 : 1 + rows[0, 0]].tolist():
        first, last = int(places[start]), int(places[start + count - 1])
        neighbours = last - first == count - 1
        found.append((slot, slice(first, last + 1) if neighbours else order[start : start + count].long(), rank))
    return found


def _tiles(slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`order` and `tiles`, without ranks, with at most TILE tokens per tile."""
    order = np.argsort(slots, kind="stable")[np.count_nonzero(slots < 0) :]
    used, counts = np.unique(slots[order], return_counts=True)
    pieces = -(-counts // TILE)
    piece = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)  # each tile's number in its slot
    begin = np.repeat(np.cumsum(counts) - counts, pieces) + piece * TILE
    count = np.minimum(np.repeat(counts, pieces) - piece * TILE, TILE)
    return order, np.stack([np.repeat(used, pieces), begin, count, count], axis=1)


def _runs(slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`order` and `tiles`, without ranks. A tile is a long run of neighbours, or all short runs of a slot."""
    borders = [0, *(np.flatnonzero(slots[1:] != slots[:-1]) + 1).tolist(), len(slots)]
    parts: list[tuple[int, list[np.ndarray]]] = []
    short: dict[int, list[np.ndarray]] = {}
    for start, end in pairwise(borders):
        slot = int(slots[start]) if end > start else BASE
        if slot >= 0 and end - start >= LONG_RUN:
            parts.append((slot, [np.arange(start, end)]))
        elif slot >= 0:
            short.setdefault(slot, []).append(np.arange(start, end))
    parts += short.items()
    order = np.concatenate([run for _, runs in parts for run in runs]) if parts else np.empty(0, dtype=np.int64)
    counts = np.array([sum(map(len, runs)) for _, runs in parts], dtype=np.int64)
    used = np.array([slot for slot, _ in parts], dtype=np.int64)
    return order, np.stack([used, np.cumsum(counts) - counts, counts, counts], axis=1)
