"""`make simulate`: compares the router's policy with others over simulated workers, and prints a table."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from bench.saving import RESULTS, save
from bench.simulate.policies import POLICIES
from bench.simulate.report import mean, plot, table
from bench.simulate.scenario import PRESETS, Engine, Scenario
from bench.simulate.simulation import simulate
from preft.core.settings import RouterSettings


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 if every request of every run got its answer, else 1."""
    arguments = _parser().parse_args(argv)
    first = _scenario(arguments)
    scenarios = [replace(first, seed=first.seed + step) for step in range(arguments.seeds)]
    groups = []
    for policy in arguments.policy or POLICIES:
        print(f"{first.name}, {policy} ...", file=sys.stderr, flush=True)
        groups.append([simulate(scenario, policy, arguments.patience) for scenario in scenarios])
    print(table({group[0].policy: mean([run.figures() for run in group]) for group in groups}))
    bound = first.wait_bound(arguments.patience)
    seeds = f"seed {first.seed}" if len(scenarios) == 1 else f"means over seeds {first.seed}-{scenarios[-1].seed}"
    print(f"\nbound on waits: {bound:.2f} s; {len(groups[0][0].requests):,} requests a run, {seeds}")
    if arguments.out is not None:
        runs = {group[0].policy: [run.figures() for run in group] for group in groups}
        figures = {"scenario": asdict(first), "bound": bound, "seeds": len(scenarios), "runs": runs}
        print(save(arguments.out, f"simulator-{first.name}", "bench.simulate", argv, figures))
    if arguments.plot is not None:
        plot([group[0] for group in groups], arguments.plot)
    return int(any(run.unfinished or run.in_flight for group in groups for run in group))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="simulate", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--preset", choices=sorted(PRESETS), default="small", help="the scenario (default: small)")
    parser.add_argument("--policy", choices=list(POLICIES), action="append", help="run this alone; repeatable")
    parser.add_argument("--load", type=float, help="share of the prefill workers' token rate")
    parser.add_argument("--zipf", type=float, help="exponent of the adapters' popularity")
    parser.add_argument("--seconds", type=float, help="that are measured, of the cluster's time")
    parser.add_argument("--seed", type=int, help="the first one")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each policy, with one seed each (default: 1)")
    parser.add_argument("--patience", type=float, default=RouterSettings().patience, help="the router's setting")
    parser.add_argument("--engine", type=Path, metavar="FILE", help="JSON object with measured values of Engine")
    parser.add_argument("--routers", type=int, help="that get the requests in turn")
    parser.add_argument("--calm", action="store_true", help="without bursts and losses of workers")
    parser.add_argument("--out", metavar="DIR", type=Path, nargs="?", const=RESULTS, help=f"save figures ({RESULTS})")
    parser.add_argument("--plot", metavar="FILE", type=Path, help="save a plot as SVG; needs the extra `train`")
    return parser


def _scenario(arguments: argparse.Namespace) -> Scenario:
    scenario = PRESETS[arguments.preset]
    given = {key: getattr(arguments, key) for key in ("load", "zipf", "seconds", "seed", "routers")}
    scenario = replace(scenario, **{key: value for key, value in given.items() if value is not None})
    if arguments.engine is not None:
        scenario = replace(scenario, engine=Engine.read(arguments.engine))
    if arguments.calm:
        scenario = replace(scenario, bursts=(), losses=())
    return scenario


if __name__ == "__main__":
    sys.exit(main())
