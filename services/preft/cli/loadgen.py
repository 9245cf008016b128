"""`preft loadgen`: measures servers at several adapter counts, compares them, makes adapters to do so.

Owns the commands; `loadgen_flags` the flags of traffic and reports; `preft_loadgen` measures.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from preft.cli.loadgen_flags import (
    add_models,
    add_report,
    add_traffic,
    check_outputs,
    described,
    load_of,
    write_outputs,
)
from preft.cli.server import add_server, api_key_of
from preft.core.errors import ConfigError, PreftError

if TYPE_CHECKING:
    from preft_loadgen.measure.compare import Comparison, Target
    from preft_loadgen.measure.sweep import Population
    from preft_loadgen.report.files import Results
    from preft_loadgen.report.metrics import Summary

KINDS = ("lora", "loreft", "direft")


class _OwnFlags(argparse._SubParsersAction):  # type: ignore[type-arg]
    """Refuses flags before the subcommand, which argparse would forget in silence."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        forgotten = [
            action.option_strings[0]
            for action in parser._actions
            if action.option_strings and getattr(namespace, action.dest, action.default) != action.default
        ]
        if forgotten:
            parser.error(f"{forgotten[0]} goes behind {values[0]}: preft loadgen {values[0]} {forgotten[0]} ...")
        super().__call__(parser, namespace, values, option_string)


def add_parser(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(
        "loadgen",
        help="measure tokens/s and latencies of servers",
        description="Streams completions over a server's adapters, one adapter count after another, and reports speeds "
        "and latencies. The server: any with OpenAI's API, or PreFT's gRPC (grpc://host:port). See docs/loadgen.md.",
    )
    add_server(parser)
    _add_load(parser, searches=True)
    parser.set_defaults(run=_run(_measure))
    parts = parser.add_subparsers(title="further commands", dest="part", metavar="COMMAND", action=_OwnFlags)

    compare = parts.add_parser(
        "compare",
        help="measure several servers in turns, and compare them",
        description="Measures several servers under the same load, in turns. The first one is the reference.",
    )
    compare.add_argument(
        "--target",
        metavar="NAME=URL",
        type=_pair,
        action="append",
        required=True,
        help="a server; at least two are needed",
    )
    compare.add_argument(
        "--target-key",
        metavar="NAME=KEY",
        type=_pair,
        action="append",
        default=[],
        help="a target's API key; NAME=env:VARIABLE reads it from the environment, where other users can't",
    )
    compare.add_argument("--rounds", metavar="N", type=int, default=5, help="runs per server and count (default: 5)")
    _add_load(compare, searches=False)
    compare.set_defaults(run=_run(_compare))

    make = parts.add_parser(
        "make-adapters",
        help="write random adapters for a base model",
        description="Writes random adapters for any base model. Only the amount of work is realistic, not the answers.",
    )
    make.add_argument("--model", metavar="DIR", type=Path, required=True, help="the base model's folder")
    make.add_argument("--out", metavar="DIR", type=Path, required=True, help="the adapters' folders go there")
    make.add_argument("--count", metavar="N", type=int, default=8, help="default: 8")
    make.add_argument("--kind", choices=KINDS, default="lora", help="default: lora")
    make.add_argument("--rank", metavar="N", type=int, default=16, help="default: 16")
    make.add_argument("--seed", metavar="N", type=int, default=0, help="equal seeds give equal adapters (default: 0)")
    make.add_argument("--progress", action="store_true", help="show progress even where stderr is no terminal")
    make.set_defaults(run=_run(_make_adapters))


def _add_load(parser: argparse.ArgumentParser, *, searches: bool) -> None:
    add_models(parser)
    add_traffic(parser, searches=searches)
    add_report(parser)


def _run(command: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    """`command`, whose load generator's errors become PreftErrors."""

    def run(args: argparse.Namespace) -> int:
        from preft_loadgen.errors import LoadgenError

        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # each request in flight needs a connection
        try:
            return command(args)
        except LoadgenError as error:
            raise PreftError(str(error)) from error

    return run


def _measure(args: argparse.Namespace) -> int:
    """Prints the table; returns 1 if a request failed or a wrong adapter answered."""
    import uvloop

    from preft_loadgen.report.files import Results

    load = load_of(args)
    check_outputs(args)
    key = api_key_of(args)

    async def measure() -> Results:
        from preft_loadgen.measure.saturation import saturate
        from preft_loadgen.measure.sweep import population, run_sweep
        from preft_loadgen.traffic.arrivals import parse_open_loop
        from preft_loadgen.transport.server import Api, open_server

        async with open_server(args.url, api=Api(args.api), api_key=key, timeout=args.timeout) as server:
            models = await population(server, args.adapters, args.model)
            counts = _counts_of(args, [models])
            if args.saturate:
                burstiness = parse_open_loop("1", args.arrivals or "poisson").burstiness
                searches = await saturate(
                    server, load, counts, models, burstiness=burstiness, force_progress=args.progress
                )
                runs = tuple(run for search in searches for run in search.measured)
                return Results(described(args), runs, tuple(searches))
            sweep = await run_sweep(server, load, counts, models, force_progress=args.progress)
            return Results(described(args), tuple(sweep))

    results = uvloop.run(measure())
    if args.json != Path("-"):
        _print(results)
    write_outputs(args, results)
    return _status([one.summary for one in results.measured])


def _compare(args: argparse.Namespace) -> int:
    """Prints all runs and the ratios; returns 1 if a request failed or a wrong adapter answered."""
    import uvloop

    from preft_loadgen.report.files import Results

    targets = dict(args.target)
    if len(targets) < len(args.target) or len(targets) < 2:
        raise ConfigError("--target: a comparison needs at least two targets, with different names")
    keys = {name: _key(name, text) for name, text in args.target_key}
    if unknown := keys.keys() - targets.keys():
        raise ConfigError(f"--target-key: there is no target {min(unknown)}")
    load = load_of(args)
    check_outputs(args)

    async def measure() -> Comparison:
        from preft_loadgen.measure.compare import Target, compare
        from preft_loadgen.measure.sweep import population
        from preft_loadgen.transport.server import Api, open_server

        async with AsyncExitStack() as stack:
            opened: list[Target] = []
            for name, url in targets.items():
                server = await stack.enter_async_context(
                    open_server(url, api=Api(args.api), api_key=keys.get(name, ""), timeout=args.timeout)
                )
                opened.append(Target(name, server, await population(server, args.adapters, args.model)))
            counts = _counts_of(args, [target.models for target in opened])
            return await compare(opened, load, counts, args.rounds, force_progress=args.progress)

    comparison = uvloop.run(measure())
    results = Results(described(args), comparison.measured, comparison=comparison)
    if args.json != Path("-"):
        _print(results)
    write_outputs(args, results)
    return _status([one.summary for one in results.measured])


def _make_adapters(args: argparse.Namespace) -> int:
    from preft_loadgen.report.progress import progress
    from preft_loadgen.synthetic import Kind, make_adapters, read_shape

    shape = read_shape(args.model)
    with progress("adapters", args.count, force=args.progress) as bar:
        made = make_adapters(
            shape, args.out, count=args.count, kind=Kind(args.kind), rank=args.rank, seed=args.seed, step=bar.update
        )
    print(f"{len(made)} adapters are in {args.out}: {made[0].name} to {made[-1].name}")
    return 0


def _counts_of(args: argparse.Namespace, models: Sequence[Population]) -> tuple[int, ...]:
    """The wanted adapter counts; by default all adapters that each server has."""
    return args.adapter_counts or (min(len(one.adapters) for one in models),)


def _print(results: Results) -> None:
    from preft_loadgen.report.tables import findings, summary_table

    print(summary_table([one.summary for one in results.measured]))
    for line in findings(results):
        print(line)


def _status(summaries: Sequence[Summary]) -> int:
    """Prints what went wrong."""
    from preft_loadgen.report.tables import notes

    for note in notes(summaries):
        print(f"preft: {note}", file=sys.stderr)
    wrong = sum(one.verify.wrong for one in summaries if one.verify)
    return 1 if wrong or any(one.errors for one in summaries) else 0


def _key(name: str, text: str) -> str:
    variable = text.removeprefix("env:")
    key = os.environ.get(variable, "") if variable != text else text
    if not key or not all("!" <= character <= "~" for character in key):
        raise ConfigError(f"--target-key: the key of {name} is empty, or has other than visible ASCII characters")
    return key


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not name or not equals or not value:
        raise argparse.ArgumentTypeError(f"{text!r} must look like NAME=VALUE")
    return name, value
