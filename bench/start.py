"""The start of `preft serve`, until requests are answered, against one plain vLLM server: `python -m bench.start`.

A prefill and a decode worker are two engines, each in a process beside its worker's; vLLM's server has one engine in a
process beside the server's.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from bench.command import bench_folder
from bench.comparison import Comparison, comparison_table, take_turns, turns
from bench.random_model import write_model
from bench.saving import RESULTS, save
from bench.vllm_server import vllm_server
from preft_loadgen.report.progress import progress
from preft_loadgen.served import served

LENGTH, BATCH, KV_BYTES = 512, 64, 512 << 20
READY_SECONDS = 900.0
BAR = 1 / 1.5
HOW = "from the start of the process to the first 200 of /ready or /health; the files are in the page cache"
PLAIN = [
    *("--dtype", "float32", "--enforce-eager", "--max-model-len", str(LENGTH), "--max-num-seqs", str(BATCH)),
    *("--kv-cache-memory-bytes", str(KV_BYTES)),
]
OURS = [
    *("--dtype", "float32", "--max-model-len", str(LENGTH)),
    *(f"--set=prefill.kv_cache_bytes={KV_BYTES}", f"--set=decode.kv_cache_bytes={KV_BYTES}"),
]


async def _plain(model: Path, folder: Path, number: int) -> float:
    started = time.monotonic()

    def start() -> float:
        with vllm_server(["--model", str(model), *PLAIN], folder / f"plain-{number}.log", READY_SECONDS):
            return time.monotonic() - started

    return 60 / await asyncio.to_thread(start)


async def _ours(model: Path, folder: Path, name: str, flags: Sequence[str], number: int) -> float:
    state, log = folder / f"{name}-{number}", folder / f"{name}-{number}.log"
    arguments = ["--model", str(model), *OURS, *flags]

    def start() -> float:
        with served(arguments, state_dir=state, log=log, ready_seconds=READY_SECONDS) as server:
            return server.start_seconds

    return 60 / await asyncio.to_thread(start)


async def _measure(rounds: int, folder: Path) -> list[Comparison]:
    model = folder / "model"
    write_model(model)
    modes = {"colocated": ["--colocated"], "disaggregated": []}
    sides = [partial(_plain, model, folder)]
    sides += [partial(_ours, model, folder, name, flags) for name, flags in modes.items()]
    with progress("starts", turns(len(sides), rounds)) as bar:
        reference, *speeds = await take_turns(sides, rounds, bar.update)
    return [
        Comparison(f"preft serve, {name}", "starts/min", ours, reference, BAR, HOW)
        for name, ours in zip(modes, speeds, strict=True)
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 if everything was measured, whatever the figures; a measurement that fails ends the process."""
    parser = argparse.ArgumentParser(prog="bench-start", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--rounds", type=int, default=3, help="starts of each server, after one to warm up (default: 3)"
    )
    parser.add_argument("--out", metavar="DIR", type=Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    with bench_folder() as folder:
        comparisons = asyncio.run(_measure(arguments.rounds, folder))
    print(comparison_table(comparisons))
    figures = {"comparisons": [one.as_json() for one in comparisons]}
    print(f"all figures are in {save(arguments.out, 'start', 'bench.start', argv, figures)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
