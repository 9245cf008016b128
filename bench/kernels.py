"""`make bench-kernels`, `make bench-gpu`: our kernels against vLLM's and against plain copies, in turns, as a table.

The benchmark needs torch, and Triton for GPU; without vLLM it leaves out vLLM's side. Speeds are medians over rounds in
which each side has one turn. On GPU every turn is many runs: replays of a CUDA graph where the case allows, so that
launches cost neither side.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.gpu_timing import seconds_on_gpu
from bench.saving import RESULTS, save
from preft_kernels.kv_blocks import KvBlocks
from preft_kernels.low_rank_delta import low_rank_delta_
from preft_kernels.residual_delta import residual_delta_
from preft_kernels.token_groups import TokenGroups

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
Work = Callable[[], Any]


@dataclass(frozen=True, slots=True)
class Figure:
    """One case: each side's median seconds, the bytes and operations it needs, and this machine's limits."""

    what: str
    seconds: dict[str, float]
    bytes: int
    flops: int
    copy_bytes_per_second: float
    matmul_flops_per_second: float

    @property
    def speedup(self) -> float | None:
        """vLLM's time divided by ours."""
        return self.seconds["vllm"] / self.seconds["ours"] if "vllm" in self.seconds else None

    @property
    def of_copy(self) -> float:
        """Our necessary bytes per second, as a fraction of a copy's."""
        return self.bytes / self.seconds["ours"] / self.copy_bytes_per_second

    @property
    def of_roofline(self) -> float:
        """The roofline's least time (copies or matrix products at full speed), as a fraction of our time."""
        least = max(self.bytes / self.copy_bytes_per_second, self.flops / self.matmul_flops_per_second)
        return least / self.seconds["ours"]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench-kernels", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="turns per side (default: 7)")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--quick", action="store_true", help="few and small cases, to see that it runs")
    arguments = parser.parse_args(argv)
    figures = [*_low_rank(arguments.rounds, arguments.quick)]
    figures += [*_residual(arguments.rounds, arguments.quick), *_kv(arguments.rounds, arguments.quick)]
    _print(figures)
    path = save(
        arguments.out,
        f"kernels-{'gpu' if ON_GPU else 'cpu'}",
        "bench.kernels",
        argv,
        {
            "device": torch.cuda.get_device_name() if ON_GPU else "cpu",
            "figures": [
                {**asdict(one), "speedup": one.speedup, "of_copy": one.of_copy, "of_roofline": one.of_roofline}
                for one in figures
            ],
        },
    )
    print(f"all figures are in {path}")
    return 0


def _low_rank(rounds: int, quick: bool) -> list[Figure]:
    """A linear layer's LoRA: consecutive prompts, each with the next adapter."""
    figures = []
    for tokens, hidden, columns, rank, adapters in _low_rank_cases(quick):
        x, y = _random(tokens, hidden), _random(tokens, sum(columns))
        a = [_random(adapters, rank, hidden) for _ in columns]
        b = [_random(adapters, size, rank) for size in columns]
        slots = torch.arange(tokens) * adapters // tokens
        groups = TokenGroups(tokens, adapters, rank, DEVICE)
        groups.set(slots.numpy())
        sides: dict[str, Work] = {"ours": partial(low_rank_delta_, y, x, a, b, groups)}
        if theirs := _vllm(y, x, a, b, slots):
            sides["vllm"] = theirs
        weights = len(slots.unique()) * rank * sum(hidden + size for size in columns)
        moved = (x.numel() + 2 * y.numel() + weights) * x.element_size()
        computed = 2 * tokens * rank * sum(hidden + size for size in columns)
        sizes = "+".join(map(str, columns))
        what = f"LoRA, {tokens} tokens, {hidden} to {sizes}, rank {rank}, {adapters} adapters"
        figures.append(_measure(what, sides, rounds, moved, computed))
    return figures


def _low_rank_cases(quick: bool) -> list[tuple[int, int, tuple[int, ...], int, int]]:
    if quick:
        return [(64, 128, (128,), 8, 4)]
    if not ON_GPU:
        return [
            (2048, 768, (768,), 16, 16),
            (2048, 768, (768,), 8, 32),
            (2048, 768, (768, 256, 256), 16, 16),
            (2048, 2048, (2048,), 16, 1),
            (256, 768, (768,), 16, 8),
        ]
    cases: list[tuple[int, int, tuple[int, ...], int, int]] = [
        (8192, 4096, (4096,), 16, adapters) for adapters in (1, 8, 64, 512)
    ]
    cases += [(8192, 4096, columns, 16, 64) for columns in ((4096, 1024, 1024), (14336, 14336))]
    return cases + [(tokens, 4096, (4096,), rank, 8) for tokens in (256, 1024, 4096, 16384) for rank in (8, 32, 128)]


def _residual(rounds: int, quick: bool) -> list[Figure]:
    """A decoder layer's ReFT."""
    sizes = [(64, 128)] if quick else [(8192, 4096), (1024, 4096)] if ON_GPU else [(2048, 768)]
    figures = []
    for tokens, hidden in sizes:
        adapters, rank = 8, 8
        stream, residual = _random(tokens, hidden), _random(tokens, hidden)
        a, b, c = _random(adapters, rank, hidden), _random(adapters, hidden, rank), _random(adapters, rank)
        groups = TokenGroups(tokens, adapters, rank, DEVICE)
        groups.set((torch.arange(tokens) * adapters // tokens).numpy())
        sides: dict[str, Work] = {"ours": partial(residual_delta_, stream, residual, a, b, c, groups)}
        moved = 3 * stream.numel() * stream.element_size()
        what = f"ReFT, {tokens} tokens, hidden {hidden}, rank {rank}, {adapters} adapters"
        figures.append(_measure(what, sides, rounds, moved, 4 * tokens * rank * hidden))
    return figures


def _kv(rounds: int, quick: bool) -> list[Figure]:
    """Packing of a prompt's blocks into one buffer on the same device."""
    layers, blocks, count = (2, 16, 4) if quick else (32, 2048, 512) if ON_GPU else (12, 512, 128)
    caches = {f"layers.{number:02}": _random(2, blocks, 16, 8, 128) for number in range(layers)}
    kv = KvBlocks(caches, blocks)
    ids = torch.randperm(blocks)[:count].tolist()
    packed = torch.empty(count * kv.block_bytes, dtype=torch.uint8, device=DEVICE)
    ours: Work = (lambda: kv.launch(ids, packed)) if ON_GPU else (lambda: kv.pack(ids, packed))
    return [
        _measure(f"KV pack, {count} blocks of {layers} layers", {"ours": ours}, rounds, 2 * len(packed), 0, graph=False)
    ]


def _vllm(
    y: torch.Tensor, x: torch.Tensor, a: Sequence[torch.Tensor], b: Sequence[torch.Tensor], slots: torch.Tensor
) -> Work | None:
    """vLLM's own implementation of the same operation; None without vLLM."""
    tokens, count, rank = len(slots), a[0].shape[0], a[0].shape[1]
    stacks = tuple(part[:, None] for part in a), tuple(part[:, None] for part in b)
    try:
        if ON_GPU:
            from vllm.lora.ops.triton_ops import LoRAKernelMeta, lora_expand, lora_shrink

            meta = LoRAKernelMeta.make(count, tokens, DEVICE)
            meta.prepare_tensors(slots.to(DEVICE, torch.int32))

            def on_gpu() -> None:
                low = torch.zeros(len(a), tokens, rank, dtype=torch.float32, device=DEVICE)
                lora_shrink(x, stacks[0], low, *meta.meta_args(tokens, False), 1.0)
                lora_expand(low, stacks[1], y, *meta.meta_args(tokens, False), offset_start=0, add_inputs=True)

            return on_gpu
        from vllm.lora.layers import LoRAMapping
        from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
    except ImportError:
        return None
    wrapper = PunicaWrapperCPU(tokens, max_batches=count, device="cpu")
    ids = tuple((slots + 1).tolist())
    wrapper.update_metadata(LoRAMapping(ids, ids, is_prefill=True), list(range(1, count + 1)), count + 1, 512)
    columns = tuple(part.shape[1] for part in b)
    return lambda: wrapper.add_lora_linear(y, x, *stacks, 1.0, columns)


def _measure(what: str, sides: dict[str, Work], rounds: int, moved: int, flops: int, *, graph: bool = True) -> Figure:
    source = torch.empty(moved // 2, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    square = _random(*[4096 if ON_GPU else 512] * 2)
    roof: dict[str, Work] = {"copy": lambda: target.copy_(source), "matmul": lambda: square @ square}
    timed = {name: _timer(work, graph) for name, work in {**sides, **roof}.items()}
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for number in range(-1, rounds):
        for name, timer in timed.items():
            taken = timer()
            if number >= 0:
                seconds[name].append(taken)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    copied, computed = moved / medians.pop("copy"), 2 * len(square) ** 3 / medians.pop("matmul")
    print(f"  {what}: {medians['ours'] * 1e6:.0f} us", file=sys.stderr, flush=True)
    return Figure(what, medians, moved, flops, copied, computed)


def _timer(work: Work, graph: bool) -> Callable[[], float]:
    """A function that runs `work` for a while and returns the seconds of one run."""
    if not ON_GPU:

        def on_cpu(least: float = 0.1) -> float:
            started, runs = time.perf_counter(), 0
            while runs < 3 or time.perf_counter() - started < least:
                work()
                runs += 1
            return (time.perf_counter() - started) / runs

        return on_cpu
    work()
    torch.cuda.synchronize()
    run: Work = work
    if graph:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            work()
        run = captured.replay
    return lambda: seconds_on_gpu(run, 50)


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE).mul_(0.1).to(DTYPE)


def _print(figures: Sequence[Figure]) -> None:
    width = max(len(figure.what) for figure in figures)
    heads = (
        f"{'ours us':>9} {'vllm us':>9} {'speedup':>8} {'GB/s':>7} {'of copy':>8} {'TFLOP/s':>8} {'of roofline':>11}"
    )
    print(f"{'':{width}}  {heads}")
    for figure in figures:
        ours, vllm = figure.seconds["ours"], figure.seconds.get("vllm")
        theirs = f"{vllm * 1e6:9.0f} {vllm / ours:7.2f}x" if vllm else f"{'':>9} {'':>8}"
        print(
            f"{figure.what:{width}}  {ours * 1e6:9.0f} {theirs} {figure.bytes / ours / 1e9:7.1f} {figure.of_copy:8.2f} "
            f"{figure.flops / ours / 1e12:8.3f} {figure.of_roofline:11.2f}"
        )


if __name__ == "__main__":
    sys.exit(main())
