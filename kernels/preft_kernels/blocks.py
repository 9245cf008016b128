"""Chooses the block sizes of a launch of the delta kernel: measured on such a GPU for such a shape, else by rule.

The module owns the choice and the files of measured choices (`tuned/<name of the GPU>.json`, written by
`bench.tune`), and launches nothing.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, replace
from functools import cache
from math import log2
from pathlib import Path

from preft_kernels.token_groups import TILE

SHIPPED = Path(__file__).parent / "tuned"
FOLDER = "PREFT_KERNEL_TUNING"
"""Environment variable: a folder with tuning files, which take precedence over the shipped ones."""

NEAR = 2.5
"""Largest distance at which a measured shape counts for another: a sum of distances in powers of two."""


@dataclass(frozen=True, slots=True)
class Work:
    """The work of one launch. `outputs` is the number of all slices' columns; `residual` marks a residual delta."""

    inputs: int
    outputs: int
    slices: int
    rank: int
    tokens: int
    residual: bool = False
    element_size: int = 2

    def distance(self, other: Work) -> float:
        """The sum over all sizes, in powers of two; infinite for another kind of work."""
        if (self.slices, self.residual, self.element_size) != (other.slices, other.residual, other.element_size):
            return float("inf")
        pairs = zip(self._sizes(), other._sizes(), strict=True)
        return sum(abs(log2(mine / theirs)) for mine, theirs in pairs)

    def _sizes(self) -> tuple[int, ...]:
        return self.inputs, self.outputs, max(self.rank, 16), min(max(self.tokens, 16), 16384)


@dataclass(frozen=True, slots=True)
class Blocks:
    """Tokens, outputs, inputs and ranks that a program takes at a time: powers of two from 16 on, `m` at most TILE.

    `splits` is 0 for shrink and expand in one launch. Otherwise the shrink is a separate launch in which `splits`
    programs share a tile's inputs; their sums go through memory once. `programs` is the number per processor.
    """

    m: int = 32
    n: int = 64
    k: int = 128
    r: int = 16
    splits: int = 0
    programs: int = 4
    warps: int = 4
    stages: int = 3


def by_rule(work: Work, processors: int) -> Blocks:
    """A choice for any shape: blocks as large as registers hold, and, for few tokens, a separate launch for the shrink.

    For few tokens a second launch costs less than a repeated shrink in each program that shares a tile's columns.
    """
    wide = work.element_size > 2
    r = min(block_rank(work.rank), 32 if wide else 64 if work.slices > 1 else 128)
    splits = min(2 * processors // -(-work.tokens // 32), work.inputs // 512, 16)
    if splits < 4:
        splits = 0
    if work.residual and work.rank > r and not splits:
        splits = 1  # one launch reads what it writes, so it would have to hold all ranks at once
    much = r * work.slices * work.element_size
    n = 64 if much <= 256 else 32
    k = 128 if much <= 64 and not work.residual else 64 if much <= 384 else 32
    return Blocks(n=n, k=k, r=r, splits=splits, warps=4 if much <= 128 else 8)


@cache
def choose(work: Work, device: str, processors: int) -> Blocks:
    """The measured choice for the nearest shape on this kind of GPU, or the rule's choice if no shape is near."""
    near = min(measured(device), key=lambda one: one[0].distance(work), default=None)
    if near is None or near[0].distance(work) > NEAR:
        return by_rule(work, processors)
    blocks = near[1]
    high = block_rank(work.rank)
    if work.residual and not blocks.splits and blocks.r < high:  # reads what it writes: needs all ranks at once
        return by_rule(work, processors)
    return replace(blocks, r=min(blocks.r, high))


@cache
def measured(device: str) -> list[tuple[Work, Blocks]]:
    """The measured choices for this kind of GPU, from the first file that exists. Raises ValueError if it is broken."""
    for folder in (os.environ.get(FOLDER), SHIPPED):
        path = folder and tuning_file(Path(folder), device)
        if path and path.is_file():
            try:
                rows = json.loads(path.read_text())["choices"]
                return [(Work(**row["work"]), _checked(Blocks(**row["blocks"]))) for row in rows]
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{path} isn't a file of measured kernel block sizes: {error}") from error
    return []


def tuning_file(folder: Path, device: str) -> Path:
    return folder / f"{device.replace(' ', '_')}.json"


def _checked(blocks: Blocks) -> Blocks:
    """Returns `blocks`. Raises ValueError for sizes with which a launch would silently skip work."""
    if any(type(value) is not int or value < (name != "splits") for name, value in asdict(blocks).items()):
        raise ValueError(f"all sizes must be whole numbers from 1 on, and splits from 0 on: {blocks}")
    sizes = (blocks.m, blocks.n, blocks.k, blocks.r)
    if any(size < 16 or size & (size - 1) for size in sizes) or blocks.m > TILE:
        raise ValueError(f"block sizes must be powers of two from 16 on, and m at most {TILE}: {blocks}")
    return blocks


def block_rank(rank: int) -> int:
    """The least power of two from 16 on that is at least `rank`; a product of tiles needs 16."""
    return max(16, 1 << (rank - 1).bit_length())
