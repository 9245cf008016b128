"""`make chaos`: faults under steady load; prints a table, and saves it. Needs `redis-server`; some faults need root."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from bench.chaos.burst import NAME as BURST
from bench.chaos.burst import Burst
from bench.chaos.churn import REQUESTS, Churn
from bench.chaos.cluster import ADAPTERS, MODEL_NAME, ChaosCluster
from bench.chaos.faults import Fault, Site, ray_faults
from bench.chaos.load import AnswerFailed, Load, make_cases
from bench.chaos.network_cluster import network_cluster
from bench.chaos.network_faults import site_faults
from bench.chaos.nodes_cluster import nodes_cluster
from bench.chaos.ray_cluster import ray_cluster
from bench.saving import RESULTS, save
from preft.core.errors import PreftError
from preft_loadgen.errors import LoadgenError
from preft_loadgen.table import table

CLIENTS = 12
STEADY_SECONDS = 5.0  # of load before a fault, and after it
IDLE_SECONDS = 30.0  # for everything to be given back, once no request runs
VOCABULARY = 952
KEYS = ("sent", "failed", "cut", "wrong", "duplicated", "missing")

Figures = dict[str, dict[str, Any]]


async def churn(cluster: ChaosCluster, load: Load) -> dict[str, Any]:
    return await Churn(cluster, load, VOCABULARY).run()


def all_faults(minutes: float) -> list[Fault]:
    """`minutes` is the length of the kills every 15 s."""
    churning = Fault(f"{REQUESTS} requests with cancels, kills and reloads", churn, brings_load=True)
    at_start = Fault(BURST, churn, brings_load=True)  # `_opened` does it
    return [at_start, *ray_faults(minutes), churning, *site_faults()]


async def _run(cluster: ChaosCluster, load: Load, fault: Fault) -> dict[str, Any]:
    """Counts of one fault, the seconds from its begin until all is served again, and what isn't given back."""
    load.start(0 if fault.brings_load else CLIENTS)
    await asyncio.sleep(STEADY_SECONDS)
    began = time.monotonic()
    facts = await fault.act(cluster, load) or {}
    await cluster.wait_whole()
    await load.probe()
    recovery = time.monotonic() - began
    await asyncio.sleep(STEADY_SECONDS)
    counts = await load.stop()
    end = time.monotonic() + IDLE_SECONDS
    while (left := await cluster.leftovers()) and time.monotonic() < end:
        await asyncio.sleep(0.5)
    return {**counts.as_json(), "recovery_s": round(recovery, 1), "left": left, **facts}


def is_good(fault: Fault, figures: dict[str, Any]) -> bool:
    """Whether no answer failed or differed, and everything was given back."""
    bad = [key for key in KEYS[1:] if figures[key] and not (key == "cut" and fault.may_cut)]
    return not bad and not figures["left"]


def figures_table(results: Figures) -> str:
    """One line per fault."""
    head = ["", *KEYS, "recovery s", "left"]
    rows = [
        [name, *(str(figures[key]) for key in KEYS), f"{figures['recovery_s']:.1f}", str(figures["left"] or "")]
        for name, figures in results.items()
    ]
    return table([head, *rows], right=range(1, len(head)))


@asynccontextmanager
async def _opened(site: Site, folder: Path, burst: Burst | None) -> AsyncIterator[ChaosCluster]:
    match site:
        case Site.RAY:

            async def at_ready(url: str) -> None:
                if burst is not None:
                    await burst.send(url)

            async with ray_cluster(folder, at_ready) as ray:
                yield ray
        case Site.NETWORK:
            async with network_cluster(folder) as network:
                yield network
        case Site.NODES:
            async with nodes_cluster(folder) as nodes:
                yield nodes


async def _measure(site: Site, folder: Path, wanted: Sequence[Fault], results: Figures) -> None:
    """Adds the figures of each fault of the site to `results`."""
    burst = Burst(VOCABULARY) if any(fault.name == BURST for fault in wanted) else None
    async with _opened(site, folder, burst) as cluster:
        if burst is not None:
            _tell(results, BURST, await burst.figures(cluster.gateways))
        load = Load(cluster.gateways, make_cases((MODEL_NAME, *ADAPTERS), VOCABULARY, seed=0))
        await load.learn()
        await asyncio.sleep(STEADY_SECONDS)
        cluster.start_figures = await cluster.held()
        for fault in wanted:
            if fault.name != BURST:
                _tell(results, fault.name, await _run(cluster, load, fault))


def _tell(results: Figures, name: str, figures: dict[str, Any]) -> None:
    results[name] = {**figures, "measured": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    shown = {key: value for key, value in figures.items() if value and key != "errors"}
    print(f"{name}: {shown}", *figures["errors"][:3], sep="\n  ", file=sys.stderr, flush=True)


def _possible(faults: Sequence[Fault]) -> list[Fault]:
    """Says which faults can't be tried here, and returns the others."""
    for fault in faults:
        if (reason := fault.unless()) is not None:
            print(f"left out: {fault.name}: {reason}", file=sys.stderr)
    return [fault for fault in faults if fault.unless() is None]


def _earlier(out: Path) -> Figures:
    """The figures of faults that an earlier run of this day has measured."""
    path = out / f"chaos-{time.strftime('%Y-%m-%d')}.json"
    if not path.exists():
        return {}
    known: Figures = json.loads(path.read_text())["faults"]
    return known


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 if no answer was lost or changed by any fault, and all was given back; 1 otherwise."""
    parser = argparse.ArgumentParser(prog="chaos", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", metavar="TEXT", action="append", help="faults whose names hold it; repeatable")
    parser.add_argument("--minutes", type=float, default=10.0, help="of kills every 15 s (default: 10)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder; a file of the same day gets more faults")
    parser.add_argument("--list", action="store_true", help="only print the names of the faults")
    arguments = parser.parse_args(argv)
    every = all_faults(arguments.minutes)
    if arguments.list:
        print(*(fault.name for fault in every), sep="\n")
        return 0
    wanted = _possible([one for one in every if any(text in one.name for text in arguments.only or [""])])
    results: Figures = {}
    problem = ""
    try:
        for site in Site:
            if here := [fault for fault in wanted if fault.site is site]:
                with tempfile.TemporaryDirectory(prefix="preft-chaos-") as folder:
                    asyncio.run(_measure(site, Path(folder), here, results))
    except (PreftError, LoadgenError, AnswerFailed) as error:
        problem = str(error)
        print(f"chaos: {error}", file=sys.stderr)
    print(figures_table(results))
    faults = {**_earlier(arguments.out), **results}
    print(f"all figures are in {save(arguments.out, 'chaos', 'bench.chaos', argv, {'faults': faults})}")
    return 0 if not problem and all(is_good(one, results[one.name]) for one in wanted) else 1


if __name__ == "__main__":
    sys.exit(main())
