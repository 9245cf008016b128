"""Tokens per second over the number of adapters: `make bench-adapters`, or `python -m bench.adapter_counts`.

All servers get the same traffic over HTTP from the load generator, in turns in one run. The adapters are random LoRAs
on all linear layers, and LoReFTs on all decoder layers. The reference is vLLM's base model. "all tokens, our kernels"
is vLLM's server with our LoRA kernels on all tokens: the fair baseline, as vLLM's LoRA on CPU is slow for reasons of
its own.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from bench.adapter_counts.systems import SYSTEMS, Sizes, running
from bench.rig import VOCABULARY, make_model
from bench.saving import RESULTS, save
from preft.core.errors import PreftError
from preft_loadgen.errors import LoadgenError
from preft_loadgen.measure.compare import Comparison, compare
from preft_loadgen.measure.sweep import ClosedLoop, Load
from preft_loadgen.report.files import Results
from preft_loadgen.report.plots import write_png
from preft_loadgen.report.tables import findings, summary_table
from preft_loadgen.traffic.choice import RoundRobin
from preft_loadgen.traffic.lengths import Lengths
from preft_loadgen.traffic.prompts import Ids, RandomPrompts

COUNTS = (0, 1, 2, 8, 32, 64, 128, 512)
RANK = 16
CACHED = 128  # adapters with room in each server's host memory


async def _measure(arguments: argparse.Namespace, folder: Path) -> tuple[Comparison, dict[str, object]]:
    most = max(arguments.counts)
    _say(f"making a random model and {2 * most} adapters")
    model = make_model(folder, loras=most, lora_rank=RANK, refts=most, reft_rank=RANK)
    paths = {path.name: path for path in sorted((folder / "adapters").iterdir())}
    loras = {name: path for name, path in paths.items() if name.startswith("a")}
    refts = {name: path for name, path in paths.items() if name.startswith("r")}
    lengths = Lengths(arguments.input, arguments.input), Lengths(arguments.output, arguments.output)
    load = Load(
        arguments.requests,
        RandomPrompts(*lengths, Ids(VOCABULARY)),
        ClosedLoop(arguments.concurrency),
        RoundRobin(),
    )
    bytes_each = max(sum(file.stat().st_size for file in path.iterdir()) for path in paths.values()) if paths else 0
    sizes = Sizes(
        slots=min(arguments.concurrency, most) or 1,
        cached=max(CACHED, arguments.concurrency),
        rank=RANK,
        adapter_bytes=2 * bytes_each,  # the files are float16, and the engines compute in float32
        length=arguments.input + arguments.output,
        batch=arguments.concurrency,
    )
    os.environ["VLLM_CPU_NUM_OF_RESERVED_CPU"] = "0"  # as in PreFT's engines: all cores compute
    async with running(tuple(arguments.systems), folder, loras, refts, sizes, _say) as targets:
        _say("all servers are ready")
        compared = await compare(targets, load, arguments.counts, arguments.rounds)
    return compared, model


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 if everything was measured, whatever the figures; 1 if a measurement failed."""
    parser = argparse.ArgumentParser(prog="bench-adapters", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--counts", type=_counts, default=COUNTS, help="adapter counts, 0 for the base model")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=SYSTEMS, help="the first is the reference")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each system at each count (default: 3)")
    parser.add_argument("--requests", type=int, default=128, help="of each measurement (default: 128)")
    parser.add_argument("--concurrency", type=int, default=64, help="requests at once (default: 64)")
    parser.add_argument("--input", type=int, default=256, help="tokens of each prompt (default: 256)")
    parser.add_argument("--output", type=int, default=256, help="tokens of each answer (default: 256)")
    parser.add_argument("--out", metavar="DIR", type=Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    started = time.monotonic()
    try:
        with tempfile.TemporaryDirectory(prefix="preft-bench-") as folder:
            compared, model = asyncio.run(_measure(arguments, Path(folder)))
    except (PreftError, LoadgenError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    load = {name: getattr(arguments, name) for name in ("requests", "concurrency", "input", "output", "rounds")}
    results = Results(load, compared.measured, comparison=compared)
    print(summary_table([one.summary for one in compared.measured]))
    for line in findings(results):
        print(line)
    figures = {"seconds": round(time.monotonic() - started), "model": model, **results.as_json()}
    path = save(arguments.out, "adapter-counts", "bench.adapter_counts", argv, figures)
    write_png(results, path.with_suffix(".png"))
    print(f"all figures are in {path}, the plot is beside it")
    return 1 if any(one.summary.errors for one in compared.measured) else 0


def _counts(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _say(message: str) -> None:
    print(f"bench: {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
