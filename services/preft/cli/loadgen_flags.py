"""The flags of `preft loadgen` for traffic and reports, and what they mean. `preft_loadgen` checks the values.

No import of `preft_loadgen` before a command runs: it brings numpy along.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from preft.core.errors import ConfigError

if TYPE_CHECKING:
    from preft_loadgen.measure.sweep import Churning, Load, Pace
    from preft_loadgen.report.files import Results
    from preft_loadgen.traffic.prompts import Count, Material, Prompts

REQUESTS = 128
HIDDEN = ("run", "command", "api_key", "target_key", "part", "json", "csv", "html", "png", "progress")
"""Arguments that don't describe the load, or that nobody should read in a report."""


def add_models(parser: argparse.ArgumentParser) -> None:
    """Adds which models are asked."""
    models = parser.add_argument_group("models")
    models.add_argument(
        "--adapters", metavar="A,B", type=_names, default=(), help="their names (default: all that /v1/models lists)"
    )
    models.add_argument(
        "--adapter-counts",
        metavar="N,N",
        type=_counts,
        help="one run for each: the first N adapters; 0 is the base model (default: one run with all adapters)",
    )
    models.add_argument("--model", metavar="NAME", help="the base model's name (default: as the server says)")
    models.add_argument(
        "--choice",
        metavar="HOW",
        default="uniform",
        help="which adapter a request names: uniform, round-robin, weights:5,3,1, zipf:A, or drift:A,R, which is zipf "
        "whose order moves by one rank every R requests (default: uniform)",
    )
    models.add_argument(
        "--churn", metavar="S", type=float, help="every S seconds an adapter appears or gets a new version"
    )
    models.add_argument(
        "--churn-from", metavar="DIR", type=Path, help="adapter folders for --churn, which the server can read"
    )


def add_traffic(parser: argparse.ArgumentParser, *, searches: bool) -> None:
    """Adds when requests are sent and what is in them. With `searches` the rate can be searched for."""
    when = parser.add_argument_group("when requests are sent")
    when.add_argument(
        "--requests", metavar="N", type=_positive, help=f"per adapter count (default: {REQUESTS}, or a whole trace)"
    )
    pace = when.add_mutually_exclusive_group()
    pace.add_argument("--concurrency", metavar="N", type=_positive, help="requests in flight (default: 16)")
    pace.add_argument("--rate", metavar="R", help="requests per second, whatever is in flight; 1-20 is a ramp")
    pace.add_argument("--trace", metavar="FILE", type=Path, help="as recorded in a Mooncake JSONL file")
    if searches:
        pace.add_argument("--saturate", action="store_true", help="search the highest rate that the server sustains")
    when.add_argument(
        "--arrivals",
        metavar="HOW",
        help="with --rate: poisson, constant, or gamma:B, bursty for B < 1 (default: poisson)",
    )
    when.add_argument("--trace-speed", metavar="X", type=float, help="with --trace: X times as fast (default: 1)")
    what = parser.add_argument_group("what is in requests")
    what.add_argument("--api", choices=("completions", "chat"), default="completions", help="default: completions")
    what.add_argument("--prompt-tokens", metavar="N", help="128, 64-256, or lognormal:MEAN,DEVIATION (default: 64)")
    what.add_argument("--output-tokens", metavar="N", help="likewise (default: 64, or a dataset's)")
    what.add_argument("--dataset", metavar="FILE", type=Path, help="prompts from a ShareGPT file, not random ones")
    what.add_argument("--turns", metavar="N", default="1", help="requests per conversation: 3, or 1-5 (default: 1)")
    what.add_argument(
        "--shared-prefix",
        metavar="S[,G]",
        help="the first part S (0 to 1) of all prompts is equal, in G groups (default: 1)",
    )
    what.add_argument(
        "--cancel", metavar="S", type=float, default=0.0, help="the share of requests that is cancelled half-way"
    )
    what.add_argument(
        "--vocabulary", metavar="N", type=_positive, help="random prompts are token ids below N (default: 256)"
    )
    what.add_argument(
        "--tokenizer", metavar="FILE", type=Path, help="a tokenizer.json, or its folder, to count tokens of texts"
    )
    what.add_argument("--stop-at-eos", action="store_true", help="answers may be shorter than asked for")
    what.add_argument("--seed", metavar="N", type=int, default=0, help="equal seeds give equal traffic (default: 0)")


def add_report(parser: argparse.ArgumentParser) -> None:
    """Adds what is judged and where results go."""
    report = parser.add_argument_group("report")
    report.add_argument("--slo", metavar="LIMITS", help="count good requests: ttft=500ms,itl=50ms (also tpot, e2e)")
    report.add_argument(
        "--verify", action="store_true", help="compare all answers with those of a calm pass: whose adapter answered?"
    )
    report.add_argument("--no-warm-up", action="store_true", help="don't ask each adapter once before a run")
    report.add_argument("--timeout", metavar="S", type=float, default=600.0, help="seconds per request (default: 600)")
    report.add_argument("--json", metavar="FILE", type=Path, help="all figures; - is stdout, without a table")
    report.add_argument("--csv", metavar="FILE", type=Path, help="one line per request")
    report.add_argument("--html", metavar="FILE", type=Path, help="one page with figures and plots")
    report.add_argument("--png", metavar="FILE", type=Path, help="the main plot")
    report.add_argument("--progress", action="store_true", help="show progress even where stderr is no terminal")


def load_of(args: argparse.Namespace) -> Load:
    """The load that the flags describe. Raises InvalidArgument or ConfigError."""
    from preft_loadgen.measure.sweep import Load
    from preft_loadgen.report.slo import parse_slo
    from preft_loadgen.traffic.choice import parse_choice
    from preft_loadgen.traffic.lengths import parse_length
    from preft_loadgen.traffic.prompts import token_counter

    _check_pairs(args)
    count = token_counter(args.tokenizer) if args.tokenizer else None
    material = _material(args, count)
    return Load(
        requests=args.requests or REQUESTS,
        prompts=_prompts(args, material, count),
        pace=_pace(args),
        choice=parse_choice(args.choice),
        turns=parse_length(args.turns),
        cancel=args.cancel,
        exact=not args.stop_at_eos,
        material=material,
        warm_up=not args.no_warm_up,
        verify=args.verify,
        churn=_churn(args),
        slo=parse_slo(args.slo) if args.slo else None,
        seed=args.seed,
    )


def described(args: argparse.Namespace) -> dict[str, Any]:
    """The flags for a report: what differs from its default, without keys."""
    return {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(args).items()
        if name not in HIDDEN and value not in (None, False, ())
    }


def check_outputs(args: argparse.Namespace) -> None:
    """Before a measurement: whether its results can be written. Raises InvalidArgument."""
    from preft_loadgen.report.files import check_writable
    from preft_loadgen.report.plots import check_plots

    if args.html or args.png:
        check_plots()
    check_writable((args.json, args.csv, args.html, args.png))


def write_outputs(args: argparse.Namespace, results: Results) -> None:
    """Writes the files that the flags name. Raises InvalidArgument."""
    from preft_loadgen.report.files import write_csv, write_json

    if args.json:
        write_json(results, args.json)
    if args.csv:
        write_csv(results, args.csv)
    if args.html:
        from preft_loadgen.report.html import write_html

        write_html(results, args.html)
    if args.png:
        from preft_loadgen.report.plots import write_png

        write_png(results, args.png)


def _pace(args: argparse.Namespace) -> Pace:
    from preft_loadgen.measure.sweep import ClosedLoop, Replay
    from preft_loadgen.traffic.arrivals import parse_open_loop
    from preft_loadgen.traffic.trace import read_trace

    if args.rate is not None:
        return parse_open_loop(args.rate, args.arrivals or "poisson")
    if args.trace is not None:
        speed = 1.0 if args.trace_speed is None else args.trace_speed
        return Replay(tuple(read_trace(args.trace, speed=speed, most=args.requests)))
    return ClosedLoop(args.concurrency or 16)


def _material(args: argparse.Namespace, count: Count | None) -> Material:
    from preft_loadgen.traffic.prompts import Ids, Words, one_token_words

    if args.api == "chat":
        return one_token_words(count) if count else Words()
    return Ids(args.vocabulary or 256)


def _prompts(args: argparse.Namespace, material: Material, count: Count | None) -> Prompts:
    from preft_loadgen.traffic.lengths import parse_length
    from preft_loadgen.traffic.prompts import RandomPrompts, SharedPrefix, read_sharegpt

    output = parse_length(args.output_tokens) if args.output_tokens else None
    if args.dataset is not None:
        return read_sharegpt(args.dataset, count, output)
    prefix = None
    if args.shared_prefix:
        share, _, groups = args.shared_prefix.partition(",")
        try:
            prefix = SharedPrefix(float(share), int(groups or 1))
        except ValueError:
            raise ConfigError(f"--shared-prefix looks like 0.5, or 0.5,8, not {args.shared_prefix!r}") from None
    return RandomPrompts(parse_length(args.prompt_tokens or "64"), output or parse_length("64"), material, prefix)


def _churn(args: argparse.Namespace) -> Churning | None:
    from preft_loadgen.measure.churn import churn_folders
    from preft_loadgen.measure.sweep import Churning

    return Churning(args.churn, churn_folders(args.churn_from)) if args.churn is not None else None


def _check_pairs(args: argparse.Namespace) -> None:
    """Refuses flags that would have no effect. Raises ConfigError."""
    saturate = getattr(args, "saturate", False)
    for is_wrong, sentence in (
        ((args.churn is None) != (args.churn_from is None), "--churn and --churn-from need each other"),
        (args.arrivals and args.rate is None and not saturate, "--arrivals needs --rate or --saturate"),
        (args.trace_speed is not None and args.trace is None, "--trace-speed needs --trace"),
        (args.dataset and args.prompt_tokens, "--prompt-tokens has no effect on a --dataset"),
        (args.dataset and args.shared_prefix, "--shared-prefix has no effect on a --dataset"),
        (args.dataset and args.vocabulary, "--vocabulary has no effect on a --dataset"),
        (args.vocabulary and args.api == "chat", "--vocabulary has no effect on chats, whose prompts are words"),
        (args.tokenizer and not args.dataset and args.api != "chat", "--tokenizer needs --dataset or --api chat"),
        (
            args.trace
            and (args.prompt_tokens or args.output_tokens or args.dataset or args.shared_prefix or args.cancel),
            "a --trace has its own prompts and lengths: leave --prompt-tokens, --output-tokens, --dataset, "
            "--shared-prefix and --cancel out",
        ),
        (args.trace and args.turns != "1", "--turns has no effect on a --trace"),
        (args.churn is not None and args.adapter_counts == (0,), "--churn needs an adapter count above 0"),
    ):
        if is_wrong:
            raise ConfigError(sentence)


def _names(text: str) -> tuple[str, ...]:
    names = tuple(part.strip() for part in text.split(","))
    if not all(names) or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"{text!r} must be different names, as in alice,bob")
    return names


def _counts(text: str) -> tuple[int, ...]:
    try:
        counts = tuple(int(part) for part in text.split(","))
    except ValueError:
        counts = ()
    if not counts or min(counts) < 0 or len(set(counts)) < len(counts):
        raise argparse.ArgumentTypeError(f"{text!r} must be different counts, as in 0,1,8,64")
    return counts


def _positive(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or not 1 <= len(text) <= 9 or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number from 1 up")
    return int(text)
