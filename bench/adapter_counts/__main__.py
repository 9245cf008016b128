"""Tokens per second over the number of adapters: `make bench-adapters`, or `python -m bench.adapter_counts`.

All servers get the same traffic over HTTP from the load generator, in turns in one run. The adapters are random LoRAs
on all linear layers, and LoReFTs on all decoder layers. The reference is vLLM's base model. "all tokens, our kernels"
is vLLM's server with our LoRA kernels on all tokens: the fair baseline, as vLLM's LoRA on CPU is slow for reasons of
its own.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.adapter_counts.systems import ALL_TOKENS, SYSTEMS, Adapters, Sizes, System, running
from bench.command import bench_folder, say
from bench.random_model import LLAMA_8B, SMALL, write_model
from bench.saving import RESULTS, save
from preft.cluster.sizing import kv_token_bytes
from preft_loadgen.measure.compare import Comparison, compare, crossovers, ratio_of
from preft_loadgen.measure.sweep import ClosedLoop, Load, described
from preft_loadgen.report.files import Results
from preft_loadgen.report.metrics import Summary
from preft_loadgen.report.plots import write_png
from preft_loadgen.report.progress import progress
from preft_loadgen.report.tables import findings, summary_table
from preft_loadgen.synthetic import Kind, make_adapters, read_shape
from preft_loadgen.table import table
from preft_loadgen.traffic.choice import Uniform
from preft_loadgen.traffic.lengths import Lengths
from preft_loadgen.traffic.prompts import Ids, RandomPrompts

COUNTS = (0, 1, 2, 8, 32, 64, 128, 512)
RANK = 16
SPARE_KV = 1.1
FILE_BYTES, GPU_BYTES, CPU_BYTES = 2, 2, 4  # of a LoRA's number: in its file, and in an engine of either kind


async def _measure(arguments: argparse.Namespace, systems: Sequence[System], folder: Path) -> Comparison:
    model = arguments.model or folder / "model"
    if arguments.model is None:
        say("making a random model")
        large = arguments.gpu and not arguments.small
        write_model(model, model=LLAMA_8B if large else SMALL, dtype="float16" if arguments.gpu else "float32")
    adapters = _adapters(model, {system.kind for system in systems if system.kind}, max(arguments.counts), folder)
    sizes = _sizes(arguments, model, adapters)
    config = json.loads((model / "config.json").read_text())
    prompts = RandomPrompts(
        Lengths(arguments.input, arguments.input),
        Lengths(arguments.output, arguments.output),
        Ids(min(config["vocab_size"], SMALL.vocabulary)),
    )
    load = Load(arguments.requests, prompts, ClosedLoop(arguments.concurrency), Uniform())
    os.environ["VLLM_CPU_NUM_OF_RESERVED_CPU"] = "0"  # as in PreFT's engines: all cores compute
    groups = [systems] if not arguments.pairs else [(systems[0], other) for other in systems[1:]]
    compared = []
    for number, group in enumerate(groups):
        place = folder / f"servers-{number}"
        place.mkdir()
        async with running(group, model, adapters, sizes, place, say) as targets:
            say("all servers are ready")
            compared.append(await compare(targets, load, arguments.counts, arguments.rounds))
    return _joined(compared)


def _adapters(model: Path, kinds: set[Kind], count: int, folder: Path) -> Adapters:
    shape = read_shape(model)
    made: dict[Kind, dict[str, Path]] = {}
    for kind in sorted(kinds) if count else ():
        with progress(f"making {kind} adapters", count) as bar:
            paths = make_adapters(
                shape, folder / "adapters", count=count, kind=kind, rank=RANK, seed=1, step=bar.update
            )
        made[kind] = {path.name: path for path in paths}
    return made


def _sizes(arguments: argparse.Namespace, model: Path, adapters: Adapters) -> Sizes:
    """Equal for all servers: KV for all requests at once, and host memory for as many adapters as `--cached`."""
    dtype = "float16" if arguments.gpu else "float32"
    length = arguments.input + arguments.output
    token = kv_token_bytes(json.loads((model / "config.json").read_text()), dtype, arguments.gpu)
    lora = next(iter(adapters.get(Kind.LORA, {}).values()), None)
    file_bytes = sum(file.stat().st_size for file in lora.iterdir()) if lora else 1 << 20
    return Sizes(
        slots=min(arguments.concurrency, max(arguments.counts)) or 1,
        cached=max(arguments.cached, arguments.concurrency),
        rank=RANK,
        adapter_bytes=file_bytes * (GPU_BYTES if arguments.gpu else CPU_BYTES) // FILE_BYTES,
        length=length,
        batch=arguments.concurrency,
        kv_bytes=int(SPARE_KV * arguments.concurrency * length * token),
        dtype=dtype,
        gpu=arguments.gpu and not arguments.small,
    )


def _joined(compared: Sequence[Comparison]) -> Comparison:
    """One comparison of all, with the ratios to the fair baseline beside those to the base model."""
    measured = tuple(one for comparison in compared for one in comparison.measured)
    ratios = [ratio for comparison in compared for ratio in comparison.ratios]
    names = list(dict.fromkeys(ratio.target for ratio in ratios))
    counts = list(dict.fromkeys(one.summary.adapters for one in measured))
    fair = []
    if ALL_TOKENS.name in names and len(compared) == 1:
        summaries = [one.summary for one in measured]
        own = [name for name in names if name != ALL_TOKENS.name]
        fair = [ratio_of(summaries, name, ALL_TOKENS.name, count) for name in own for count in counts]
    crossed = [crossing for comparison in compared for crossing in comparison.crossovers] + crossovers(fair)
    return Comparison(measured, (*ratios, *fair), tuple(crossed))


def counts_table(summaries: Sequence[Summary]) -> str:
    """Medians of the rounds: output tokens/s, and p50 of the time per output token in ms, a column per count."""
    counts = list(dict.fromkeys(one.adapters for one in summaries))
    rows = []
    for name in dict.fromkeys(one.target for one in summaries):
        cells = []
        for count in counts:
            own = [one for one in summaries if (one.target, one.adapters) == (name, count)]
            speed = statistics.median(one.tokens_per_s for one in own)
            times = [one.tpot.p50 for one in own if one.tpot is not None]
            cells.append(f"{speed:.0f} / {1000 * statistics.median(times):.1f}" if times else f"{speed:.0f}")
        rows.append([name, *cells])
    head = ["tokens/s / ms per token", *map(described, counts)]
    return table([head, *rows], right=range(1, len(head)))


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 if everything was measured, whatever the figures; 1 if requests failed."""
    parser = argparse.ArgumentParser(prog="bench-adapters", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--counts", type=_counts, default=COUNTS, help="adapter counts, 0 for the base model")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=[*SYSTEMS], help="the first is the reference")
    parser.add_argument("--pairs", action="store_true", help="start each server beside the first one alone")
    parser.add_argument("--rounds", type=int, default=3, help="of all systems (default: 3; vLLM multi-LoRA on CPU: 1)")
    parser.add_argument("--requests", type=int, default=64, help="of each measurement (default: 64)")
    parser.add_argument("--concurrency", type=int, default=64, help="requests at once (default: 64)")
    parser.add_argument("--input", type=int, default=256, help="tokens of each prompt (default: 256)")
    parser.add_argument("--output", type=int, default=256, help="tokens of each answer (default: 256)")
    parser.add_argument("--cached", type=int, default=96, help="adapters with room in host memory (default: 96)")
    parser.add_argument("--model", type=Path, help="default: a random one of 88 million parameters")
    parser.add_argument("--gpu", action="store_true", help="float16, and a random model of Llama-3.1-8B's shapes")
    parser.add_argument("--small", action="store_true", help="with --gpu: try it on a CPU, with the small model")
    parser.add_argument("--name", default="adapter-counts", help="how the files' names begin")
    parser.add_argument("--out", metavar="DIR", type=Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    started = time.monotonic()
    systems = [SYSTEMS[name] for name in arguments.systems]
    with bench_folder() as folder:
        compared = asyncio.run(_measure(arguments, systems, folder))
    summaries = compared.summaries
    kept = ("requests", "concurrency", "input", "output", "cached", "rounds")
    results = Results({name: getattr(arguments, name) for name in kept}, compared.measured, comparison=compared)
    print(summary_table(summaries))
    for line in findings(results):
        print(line)
    print(counts_table(summaries))
    figures: dict[str, Any] = {"seconds": round(time.monotonic() - started), "rank": RANK, **results.as_json()}
    for run in figures["runs"]:
        del run["by_adapter"]  # hundreds of lines, each about one request or two
    path = save(arguments.out, arguments.name, "bench.adapter_counts", argv, figures)
    write_png(results, path.with_suffix(".png"))
    print(f"all figures are in {path}, the plot is beside it")
    return 1 if any(summary.errors for summary in summaries) else 0


def _counts(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


if __name__ == "__main__":
    sys.exit(main())
