"""`make chaos`: faults under steady load; prints a table, and saves it. Needs `redis-server`."""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.chaos.cluster import ADAPTERS, MODEL_NAME, ChaosCluster, chaos_cluster
from bench.chaos.faults import Fault, faults
from bench.chaos.load import AnswerFailed, Load, make_cases
from bench.saving import RESULTS, save
from preft.core.errors import PreftError
from preft_loadgen.errors import LoadgenError
from preft_loadgen.table import table

CLIENTS = 12
STEADY_SECONDS = 5.0  # of load before a fault, and after it
IDLE_SECONDS = 30.0  # for everything to be given back, once no request runs
VOCABULARY = 952
KEYS = ("sent", "failed", "cut", "wrong", "duplicated", "missing")


async def _run(cluster: ChaosCluster, load: Load, fault: Fault) -> dict[str, Any]:
    """Counts of one fault, the seconds from its begin until all workers are ready, and what isn't given back."""
    load.start(CLIENTS)
    await asyncio.sleep(STEADY_SECONDS)
    began = time.monotonic()
    await fault.act(cluster, load)
    await cluster.wait_whole()
    recovery = time.monotonic() - began
    await asyncio.sleep(STEADY_SECONDS)
    counts = await load.stop()
    end = time.monotonic() + IDLE_SECONDS
    while (left := await cluster.leftovers()) and time.monotonic() < end:
        await asyncio.sleep(0.5)
    return {**counts.as_json(), "recovery_s": round(recovery, 1), "left": left}


def is_good(fault: Fault, figures: dict[str, Any]) -> bool:
    """Whether no answer failed or differed, and everything was given back."""
    bad = [key for key in KEYS[1:] if figures[key] and not (key == "cut" and fault.may_cut)]
    return not bad and not figures["left"]


def figures_table(results: dict[str, dict[str, Any]]) -> str:
    """One line per fault."""
    head = ["", *KEYS, "recovery s", "left"]
    rows = [
        [name, *(str(figures[key]) for key in KEYS), f"{figures['recovery_s']:.1f}", str(figures["left"] or "")]
        for name, figures in results.items()
    ]
    return table([head, *rows], right=range(1, len(head)))


async def _measure(folder: Path, wanted: Sequence[Fault]) -> dict[str, dict[str, Any]]:
    results = {}
    async with chaos_cluster(folder) as cluster:
        load = Load(cluster.gateways, make_cases((MODEL_NAME, *ADAPTERS), VOCABULARY, seed=0))
        await load.learn()
        for fault in wanted:
            results[fault.name] = figures = await _run(cluster, load, fault)
            shown = {key: value for key, value in figures.items() if value and key != "errors"}
            print(f"{fault.name}: {shown}", *figures["errors"][:3], sep="\n  ", file=sys.stderr, flush=True)
    return results


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 if no answer was lost or changed by any fault; 1 otherwise."""
    parser = argparse.ArgumentParser(prog="chaos", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", metavar="TEXT", action="append", help="faults whose names hold it; repeatable")
    parser.add_argument("--minutes", type=float, default=10.0, help="of kills every 15 s (default: 10)")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    every = faults(arguments.minutes)
    wanted = [one for one in every if any(text in one.name for text in arguments.only or [""])]
    try:
        with tempfile.TemporaryDirectory(prefix="preft-chaos-") as folder:
            results = asyncio.run(_measure(Path(folder), wanted))
    except (PreftError, LoadgenError, AnswerFailed) as error:
        print(f"chaos: {error}", file=sys.stderr)
        return 1
    print(figures_table(results))
    print(f"all figures are in {save(arguments.out, 'chaos', 'bench.chaos', argv, {'faults': results})}")
    return 0 if all(is_good(one, results[one.name]) for one in wanted) else 1


if __name__ == "__main__":
    sys.exit(main())
