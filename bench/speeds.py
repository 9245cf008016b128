"""`make bench`: every speed figure side by side in one run, as one table and one JSON file.

Each figure is a ratio of two sides that take turns on the same machine. The figures are medians over the rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import decode, over_http, prefill, transfer
from bench.command import bench_folder, say
from bench.comparison import Comparison, comparison_table, turns
from bench.rig import bench_rig
from bench.saving import RESULTS, save
from preft_loadgen.report.progress import progress

PARTS = ("transfer", "prefill", "decode", "http")
OFTEN = 3  # runs per round of prefill and decode: the runs are short and their bars narrow
TRANSFER_BAR = 0.28


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 if everything was measured, whatever the figures; a measurement that fails ends the process."""
    parser = argparse.ArgumentParser(prog="bench", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--rounds",
        metavar="N",
        type=int,
        default=5,
        help=f"measurements per figure, {OFTEN} times for prefill and decode (default: 5)",
    )
    parser.add_argument("--only", choices=PARTS, action="append", help="measure this part alone; repeatable")
    parser.add_argument("--out", metavar="DIR", type=Path, default=RESULTS)
    parser.add_argument("--name", default="cpu", help="how the file's name begins (default: cpu)")
    arguments = parser.parse_args(argv)
    parts = arguments.only or PARTS
    started = time.monotonic()
    with bench_folder() as folder:
        comparisons, model = asyncio.run(_measure(parts, arguments.rounds, folder))
    seconds = time.monotonic() - started
    print(comparison_table(comparisons))
    path = save(
        arguments.out,
        arguments.name,
        "bench.speeds",
        argv,
        {"seconds": round(seconds), "model": model, "comparisons": [one.as_json() for one in comparisons]},
    )
    print(f"{seconds:.0f} s; all figures are in {path}")
    return 0


async def _measure(parts: Sequence[str], rounds: int, folder: Path) -> tuple[list[Comparison], dict[str, Any]]:
    comparisons: list[Comparison] = []
    model: dict[str, Any] = {}
    if "transfer" in parts:
        say("KV push against raw TCP")
        comparisons += await asyncio.to_thread(_compare_transfer)
    if set(parts) - {"transfer"}:
        async with bench_rig(folder, say, multi_lora="http" in parts) as rig:
            model = rig.model
            if "prefill" in parts:
                with progress("prefill", turns(prefill.SIDES, OFTEN * rounds)) as bar:
                    comparisons += await prefill.compare_prefill(rig, OFTEN * rounds, bar.update)
            if "decode" in parts:
                with progress("decode", turns(decode.SIDES, OFTEN * rounds)) as bar:
                    comparisons += await decode.compare_decode(rig, OFTEN * rounds, bar.update)
            if "http" in parts:
                with progress("HTTP", turns(over_http.SIDES, rounds)) as bar:
                    comparisons += await over_http.compare_http(rig, rounds, bar.update)
    return comparisons, model


def _compare_transfer() -> list[Comparison]:
    figures = transfer.measure()
    plain = [
        Comparison(
            what=f"KV push of {figure.num_bytes >> 20} MiB",
            unit="GB/s",
            ours=(figure.num_bytes / figure.grpc / 1e9,),
            reference=(figure.num_bytes / figure.tcp / 1e9,),
            bar=TRANSFER_BAR,
            how="medians; ours: checksum, gRPC push and check by the receiver; reference: blocking sockets on loopback",
        )
        for figure in figures
    ]
    encrypted = [
        Comparison(
            what=f"KV push of {figure.num_bytes >> 20} MiB over TLS",
            unit="GB/s",
            ours=(figure.num_bytes / figure.tls / 1e9,),
            reference=(figure.num_bytes / figure.grpc / 1e9,),
            bar=0.0,
            how="medians; ours: as above, over mutual TLS; reference: ours above. There is no target",
        )
        for figure in figures
    ]
    return plain + encrypted


if __name__ == "__main__":
    sys.exit(main())
