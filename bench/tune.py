"""`make tune-gpu`: measures block sizes of the delta kernel for the layers of common models on this machine's GPU.

The program writes `tuned/<name of the GPU>.json`, from which launches choose (see `blocks`). It needs only torch and
Triton. A choice is kept if its result equals that of the rule's choice, and if it takes at most KEEP of the rule's
time. The time is a sum of medians over two mixes: one adapter for all tokens, and consecutive prompts of 64 tokens,
each with its own adapter. `--processes` processes compile at a time, and one of them measures.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from bench.gpu_timing import seconds_on_gpu
from preft_kernels._triton import triton
from preft_kernels.blocks import FOLDER, SHIPPED, Blocks, Work, block_rank, by_rule, tuning_file
from preft_kernels.low_rank_delta import launch_delta, processors
from preft_kernels.token_groups import TokenGroups

KEEP = 0.97
MODELS = {  # hidden size, columns of q, of k and of v, intermediate size
    "Llama 3 8B": (4096, 4096, 1024, 14336),
    "Llama 3 70B": (8192, 8192, 1024, 28672),
    "Qwen 2.5 0.5B": (896, 896, 128, 4864),
    "Qwen 2.5 7B": (3584, 3584, 512, 18944),
    "Qwen 2.5 32B": (5120, 5120, 1024, 27648),
    "Qwen 3 4B": (2560, 4096, 1024, 9728),
}
RANKS = (16, 64, 128)  # a lower rank costs as much as 16
TOKENS = (64, 256, 1024, 4096, 16384)
MOST_ADAPTERS = 64
Run = Callable[[], None]


def layers(models: Iterable[tuple[int, ...]]) -> list[tuple[int, tuple[int, ...], bool]]:
    """For every layer that an adapter can change: inputs, columns per slice, and whether the adapter is a ReFT."""
    found = []
    for hidden, q, kv, inner in models:
        found += [(hidden, (q, kv, kv), False), (q, (hidden,), False), (hidden, (inner, inner), False)]
        found += [(inner, (hidden,), False), (hidden, (hidden,), True)]
    return list(dict.fromkeys(found))


def tune(
    inputs: int,
    columns: tuple[int, ...],
    rank: int,
    tokens: int,
    residual: bool,
    device: str,
    seconds: Callable[[Run], float],
    alone: AbstractContextManager[Any],
) -> dict[str, Any]:
    """The fastest correct blocks for one shape, and the measured times. Holds `alone` while it measures."""
    work = Work(inputs, sum(columns), len(columns), rank, tokens, residual)
    mixes = [_Mix(work, columns, adapters, device) for adapters in {1, min(MOST_ADAPTERS, -(-tokens // 64))}]
    rule, *others = dict.fromkeys(candidates(work, processors(torch.device(device))))
    expected = [mix.result(rule) for mix in mixes]
    found = {rule: 0.0}
    for blocks in others:
        try:
            mixes[0].run(blocks, idle=True)()  # compiles
        except triton.runtime.errors.OutOfResources:
            continue
        with alone:
            results = [mix.result(blocks) for mix in mixes]
            if all(torch.allclose(*pair, rtol=2e-2, atol=2e-2) for pair in zip(results, expected, strict=True)):
                found[blocks] = sum(seconds(mix.run(blocks)) for mix in mixes)
            else:
                print(f"WRONG: {work} {blocks}", file=sys.stderr, flush=True)
    turns: dict[Blocks, list[float]] = {blocks: [] for blocks in sorted(found, key=lambda one: found[one])[:4]}
    with alone:
        for _ in range(5):
            for blocks, times in turns.items():
                times.append(sum(seconds(mix.run(blocks)) for mix in mixes))
    medians = {blocks: statistics.median(times) for blocks, times in turns.items()}
    best = min(medians, key=lambda blocks: medians[blocks])
    if medians[best] > KEEP * medians[rule]:
        best = rule
    return {"work": work, "blocks": best, "us": medians[best] * 1e6, "rule_us": medians[rule] * 1e6}


def candidates(work: Work, processors: int) -> Iterator[Blocks]:
    """Choices to measure for this work, the rule's choice first. Some may not fit on a GPU."""
    rule = by_rule(work, processors)
    yield rule
    high = block_rank(work.rank)
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


class _Mix:
    """Arguments of one shape: runs of tokens, one run per adapter."""

    def __init__(self, work: Work, columns: tuple[int, ...], adapters: int, device: str) -> None:
        def random(*shape: int) -> torch.Tensor:
            return torch.randn(shape, device=device, generator=generator).mul_(0.1).to(torch.bfloat16)

        generator = torch.Generator(device).manual_seed(0)
        self._y = random(work.tokens, work.outputs)
        self._spoiled = self._y.clone()
        self._x = random(work.tokens, work.inputs)
        self._a = [random(adapters, work.rank, work.inputs) for _ in columns]
        self._b = [random(adapters, size, work.rank) for size in columns]
        slots = torch.arange(work.tokens) * adapters // work.tokens
        self._groups = TokenGroups.of(slots.to(device), adapters, work.rank)
        self._none = TokenGroups(work.tokens, adapters, work.rank, device)
        self._more = {"addend": self._x, "c": random(adapters, work.rank)} if work.residual else {}

    def run(self, blocks: Blocks, y: torch.Tensor | None = None, *, idle: bool = False) -> Run:
        """Returns a function that adds the delta to `y`, or to a scratch tensor. `idle` means for no token."""
        y = self._spoiled if y is None else y
        groups = self._none if idle else self._groups
        x = y if self._more else self._x
        return lambda: launch_delta(
            y, x, self._a, self._b, groups.order, groups.tiles, scale=0.5, blocks=blocks, **self._more
        )

    def result(self, blocks: Blocks) -> torch.Tensor:
        y = self._y.clone()
        self.run(blocks, y)()
        return y


def _seconds(run: Run) -> float:
    run()
    return seconds_on_gpu(run, 20)


def _start(lock: Any) -> None:
    global _alone
    _alone = lock


def _tune(shape: tuple[int, tuple[int, ...], int, int, bool]) -> dict[str, Any]:
    row = tune(*shape, "cuda", _seconds, _alone)
    print(f"{row['rule_us']:9.1f} us by rule, {row['us']:9.1f} by {row['blocks']}: {row['work']}", flush=True)
    return row


_alone: Any = None  # the lock that a process holds while it measures


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tune-gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", action="append", choices=MODELS, help="default: all that are known")
    parser.add_argument(
        "--sizes",
        type=_sizes,
        action="append",
        metavar="HIDDEN,Q,KV,INTERMEDIATE",
        help="of another model, or of its part on one GPU",
    )
    parser.add_argument("--rank", type=int, action="append", help=f"default: {RANKS}")
    parser.add_argument("--tokens", type=int, action="append", help=f"default: {TOKENS}")
    parser.add_argument("--processes", type=int, default=min(8, os.cpu_count() or 1))
    parser.add_argument("--out", type=Path, default=SHIPPED, help=f"folder; launches look at {FOLDER} first")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("no GPU was found")
    sizes = arguments.sizes or []
    if arguments.model or not sizes:
        sizes = [*sizes, *(MODELS[name] for name in arguments.model or MODELS)]
    shapes = [
        (inputs, columns, rank, tokens, residual)
        for inputs, columns, residual in layers(sizes)
        for rank in arguments.rank or RANKS
        for tokens in arguments.tokens or TOKENS
    ]
    spawn = multiprocessing.get_context("spawn")
    with spawn.Pool(arguments.processes, _start, (spawn.Lock(),)) as pool:
        rows = list(pool.imap(_tune, shapes))
    device = torch.cuda.get_device_name()
    about = {
        "torch": torch.__version__,
        "triton": triton.__version__,
        "command": f"bench.tune {' '.join(argv or sys.argv[1:])}",
    }
    gains = [row["rule_us"] / row["us"] for row in rows]
    print(f"{len(rows)} shapes, {statistics.geometric_mean(gains):.2f} times the rule's speed (geometric mean)")
    print(write(arguments.out, device, about, rows))
    return 0


def write(folder: Path, device: str, about: dict[str, Any], rows: list[dict[str, Any]]) -> Path:
    """Writes the tuning file. Each of `rows` has `work`, `blocks` and the measured figures."""
    folder.mkdir(parents=True, exist_ok=True)
    path = tuning_file(folder, device)
    lines = ",\n".join(
        "  " + json.dumps({**row, "work": asdict(row["work"]), "blocks": asdict(row["blocks"])}) for row in rows
    )
    path.write_text(f'{{"device": {json.dumps(device)}, "about": {json.dumps(about)}, "choices": [\n{lines}\n]}}\n')
    return path


def _sizes(text: str) -> tuple[int, ...]:
    sizes = tuple(map(int, text.split(",")))
    if len(sizes) != 4:
        raise ValueError(text)
    return sizes


if __name__ == "__main__":
    sys.exit(main())
