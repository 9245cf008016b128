"""`preft loadgen`: measures a running server at several adapter counts. Owns the flags; `preft_loadgen` measures."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from preft.cli.server import add_server, api_key_of
from preft.core.errors import ConfigError, PreftError


def add_parser(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(
        "loadgen",
        help="measure tokens/s and latencies of a running server",
        description="Streams completions of random prompts over the served adapters, one adapter count after another.",
    )
    add_server(parser)
    parser.add_argument(
        "--adapters", metavar="N,N", type=_counts, default=(1,), help="adapter counts; 0 is the base model (default: 1)"
    )
    parser.add_argument("--requests", metavar="N", type=_positive, default=128, help="per adapter count (default: 128)")
    load = parser.add_mutually_exclusive_group()
    load.add_argument("--concurrency", metavar="N", type=_positive, default=16, help="requests in flight (default: 16)")
    load.add_argument(
        "--rate", metavar="R", type=float, help="requests per second, at random times, whatever is in flight"
    )
    parser.add_argument("--prompt-tokens", metavar="N", default="64", help="128, or 64-256 (default: 64)")
    parser.add_argument("--output-tokens", metavar="N", default="64", help="128, or 64-256 (default: 64)")
    parser.add_argument(
        "--popularity", choices=("uniform", "zipf"), default="uniform", help="of adapters (default: uniform)"
    )
    parser.add_argument("--vocabulary", metavar="N", type=_positive, default=256, help="prompts are ids below N")
    parser.add_argument("--seed", metavar="N", type=int, default=0)
    parser.add_argument("--timeout", metavar="S", type=float, default=600.0, help="seconds per request (default: 600)")
    parser.add_argument(
        "--json", metavar="FILE", type=Path, help="write all figures there too; - is stdout, without a table"
    )
    parser.add_argument("--progress", action="store_true", help="show the bar even where stderr is no terminal")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints the table; returns 1 if a request failed. Raises PreftError if the server can't be measured."""
    from preft_loadgen.errors import LoadgenError

    try:
        return _measure(args)
    except LoadgenError as error:
        raise PreftError(str(error)) from error


def _measure(args: argparse.Namespace) -> int:
    from preft_loadgen.http_stream import HttpClient
    from preft_loadgen.report import summary_table
    from preft_loadgen.sweep import Sweep, run_sweep
    from preft_loadgen.workload import Lengths, Popularity

    sweep = Sweep(
        requests=args.requests,
        prompt=Lengths.parse(args.prompt_tokens),
        output=Lengths.parse(args.output_tokens),
        concurrency=args.concurrency,
        rate=args.rate,
        popularity=Popularity(args.popularity),
        seed=args.seed,
        vocabulary=args.vocabulary,
    )
    client = HttpClient(args.url, timeout=args.timeout, api_key=api_key_of(args))
    summaries = asyncio.run(run_sweep(client, sweep, args.adapters, force_progress=args.progress))
    if args.json != Path("-"):
        print(summary_table(summaries))
    if args.json is not None:
        _write(args.json, {"sweep": dataclasses.asdict(sweep), "runs": [dataclasses.asdict(run) for run in summaries]})
    for summary in summaries:
        if summary.first_error is not None:
            print(f"preft: {summary.errors} requests failed, the first with: {summary.first_error}", file=sys.stderr)
    return 1 if any(summary.errors for summary in summaries) else 0


def _write(path: Path, figures: dict[str, Any]) -> None:
    text = json.dumps(figures, indent=2)
    if path == Path("-"):
        print(text)
        return
    try:
        path.write_text(text + "\n")
    except OSError as error:
        raise ConfigError(f"--json: {path} can't be written: {error.strerror}") from error


def _counts(text: str) -> tuple[int, ...]:
    try:
        counts = tuple(int(part) for part in text.split(","))
    except ValueError:
        counts = ()
    if not counts or min(counts) < 0:
        raise argparse.ArgumentTypeError(f"{text!r} must look like 1,2,4,8")
    return counts


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number from 1 up")
    return int(text)
