"""Chooses the block sizes of a launch of the delta kernel: measured on such a GPU for such a shape, else by rule.

The module owns the choice and the files of measured choices (`tuned/<name of the GPU>.json`, written by
`preft_kernels.tune`), and launches nothing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from math import log2
from pathlib import Path
from typing import Any

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
    r = min(_power(work.rank), 32 if wide else 64 if work.slices > 1 else 128)
    splits = min(2 * processors // -(-work.tokens // 32), work.inputs // 512, 16)
    if splits < 4:
        splits = 0
    if work.residual and work.rank > r and not splits:
        splits = 1  # one launch reads what it writes, so it would have to hold all ranks at once
    much = r * work.slices * work.element_size
    n = 64 if much <= 256 else 32
    k = 128 if much <= 64 and not work.residual else 64 if much <= 384 else 32
    return Blocks(n=n, k=k, r=r, splits=splits, warps=4 if much <= 128 else 8)


def candidates(work: Work, processors: int) -> Iterator[Blocks]:
    """Choices to measure for this work, the rule's choice first. Some may not fit on a GPU."""
    rule = by_rule(work, processors)
    yield rule
    high = _power(work.rank)
    for m in (16, 32, 64):
        for r in {min(high, 64), min(high, 128)}:
            if work.residual and r < high:
                continue
            fused = [Blocks(m, n, k, r) for n, k in ((64, 64), (64, 128), (128, 64), (128, 128))]
            found = [replace(blocks, programs=programs) for blocks in fused for programs in (2, 4, 8)]
            fits = [splits for splits in (1, 4, 16) if splits == 1 or work.tokens // m * splits <= 16 * processors]
            found += [replace(blocks, splits=splits) for blocks in fused for splits in fits]
            found += [replace(blocks, warps=8) for blocks in fused if m == 64 or r == 128]
            found += [replace(blocks, stages=4, programs=2) for blocks in fused]
            yield from (blocks for blocks in found if blocks != rule)


@cache
def choose(work: Work, device: str, processors: int) -> Blocks:
    """The measured choice for the nearest shape on this kind of GPU, or the rule's choice if no shape is near."""
    near = min(measured(device), key=lambda one: one[0].distance(work), default=None)
    if near is None or near[0].distance(work) > NEAR:
        return by_rule(work, processors)
    blocks = near[1]
    high = _power(work.rank)
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


def write(folder: Path, device: str, about: dict[str, Any], rows: list[dict[str, Any]]) -> Path:
    """Writes the tuning file. Each of `rows` has `work`, `blocks` and the measured figures."""
    folder.mkdir(parents=True, exist_ok=True)
    path = tuning_file(folder, device)
    lines = ",\n".join(
        "  " + json.dumps({**row, "work": asdict(row["work"]), "blocks": asdict(row["blocks"])}) for row in rows
    )
    path.write_text(f'{{"device": {json.dumps(device)}, "about": {json.dumps(about)}, "choices": [\n{lines}\n]}}\n')
    return path


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


def _power(rank: int) -> int:
    """The least power of two from 16 on that is at least `rank`; a product of tiles needs 16."""
    return max(16, 1 << (rank - 1).bit_length())
