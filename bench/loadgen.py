"""Whether the load generator is fast enough: `python -m bench.loadgen`. Needs no model.

Streams from `stub_server`, which runs in another process. Two figures: tokens per second of the client's CPU time while
each token arrives alone, as from an engine; and tokens per second of a server that sends as fast as it can. With
`--against-vllm`, vLLM's `bench serve` measures the same server in turns, and the figures of both clients are compared.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import uvloop

from bench.rig import make_model
from bench.saving import RESULTS, save
from bench.stub_server import MODEL
from preft_loadgen.child import bound
from preft_loadgen.errors import LoadgenError
from preft_loadgen.measure.sweep import ClosedLoop, Load, Population, measure
from preft_loadgen.report.metrics import Summary
from preft_loadgen.table import table
from preft_loadgen.traffic.lengths import Lengths
from preft_loadgen.traffic.prompts import RandomPrompts
from preft_loadgen.transport.server import Server, open_server

BAR = 20_000  # streamed tokens per second and core
AGREEMENT = 0.05  # by which the figures of two clients may differ
STREAMS, PROMPT, OUTPUT = 64, 64, 256
PACES = {"each token alone": 0.02, "as fast as it can": 0.0}  # seconds between a stream's tokens
VLLM = """
import sys
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args(sys.argv[1:]))
"""


class VllmBenchFailed(LoadgenError):
    """vLLM's `bench serve` ended with an error."""


@dataclass(frozen=True, slots=True)
class Figure:
    """Medians over the rounds. `by_cpu`: tokens per second of the client's CPU time, which is one core's speed."""

    what: str
    tokens_per_s: float
    by_cpu: float
    itl_p50: float

    @property
    def ratio(self) -> float:
        """The speed of one core, by the bar."""
        return self.by_cpu / BAR


@dataclass(frozen=True, slots=True)
class Agreement:
    """One figure as both clients measured it, per round."""

    what: str
    ours: tuple[float, ...]
    vllm: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """The median of the rounds' ratios."""
        return statistics.median(own / other for own, other in zip(self.ours, self.vllm, strict=True))


@contextmanager
def stub_server(step: float) -> Iterator[str]:
    """The stub in a process of its own; yields its address."""
    command = bound([sys.executable, "-m", "bench.stub_server", "--step", str(step)])
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.terminate()
        process.communicate()


async def _run(server: Server, load: Load, models: Population, number: int) -> tuple[Summary, float]:
    """One run and the seconds of CPU time that this process spent on it. Raises LoadgenError if a request failed."""
    started = time.process_time()
    summary = (await measure(server, load, 0, models, number)).summary
    if summary.errors:
        raise LoadgenError(f"{summary.errors} requests failed, the first with: {summary.first_error}")
    return summary, time.process_time() - started


def measure_speed(rounds: int, tokens: int) -> list[Figure]:
    """How many tokens per second the client can read; each run has `tokens` tokens. Raises LoadgenError."""
    prompts = RandomPrompts(Lengths(PROMPT, PROMPT), Lengths(OUTPUT, OUTPUT))
    load = Load(max(STREAMS, tokens // OUTPUT), prompts, ClosedLoop(STREAMS), warm_up=False)

    async def measured(url: str) -> list[tuple[Summary, float]]:
        async with open_server(url) as server:
            return [await _run(server, load, Population(MODEL, ()), number) for number in range(rounds)]

    found = []
    for what, step in PACES.items():
        with stub_server(step) as url:
            runs = uvloop.run(measured(url))
        found.append(
            Figure(
                what,
                statistics.median(summary.tokens_per_s for summary, _ in runs),
                statistics.median(summary.tokens / cpu for summary, cpu in runs),
                statistics.median(summary.itl.p50 if summary.itl else 0.0 for summary, _ in runs),
            )
        )
    return found


def vllm_bench(url: str, model: str, tokenizer: Path, requests: int, folder: Path) -> dict[str, Any]:
    """Runs vLLM's client against the server; returns its figures. Raises VllmBenchFailed."""
    flags = {
        "base-url": url,
        "model": model,
        "tokenizer": str(tokenizer),
        "dataset-name": "random",
        "random-input-len": PROMPT,
        "random-output-len": OUTPUT,
        "num-prompts": requests,
        "max-concurrency": STREAMS,
        "temperature": 0,
        "result-dir": str(folder),
        "result-filename": "vllm.json",
    }
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-c", VLLM, *words, "--ignore-eos", "--save-result", "--disable-tqdm"]
    ran = subprocess.run(bound(command), capture_output=True, text=True, check=False)
    with contextlib.suppress(OSError, ValueError):
        figures: dict[str, Any] = json.loads((folder / "vllm.json").read_text())
        (folder / "vllm.json").unlink()
        if figures["failed"] == 0 and ran.returncode == 0:
            return figures
    raise VllmBenchFailed(f"vLLM's bench serve failed:\n{(ran.stdout + ran.stderr)[-2000:]}")


def compare_with_vllm(url: str, model: str, tokenizer: Path, rounds: int, requests: int) -> list[Agreement]:
    """Both clients measure the server at `url` in turns. Raises LoadgenError."""
    prompts = RandomPrompts(Lengths(PROMPT, PROMPT), Lengths(OUTPUT, OUTPUT))
    load = Load(requests, prompts, ClosedLoop(STREAMS), warm_up=False)

    async def ours(number: int) -> Summary:
        async with open_server(url) as server:
            return (await _run(server, load, Population(model, ()), number))[0]

    own: list[Summary] = []
    theirs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="preft-bench-") as folder:
        for number in range(rounds):
            for turn in range(2):
                if (turn + number) % 2:
                    theirs.append(vllm_bench(url, model, tokenizer, requests, Path(folder)))
                else:
                    own.append(uvloop.run(ours(number)))

    def agreement(what: str, mine: Sequence[float], key: str, scale: float = 1.0) -> Agreement:
        return Agreement(what, tuple(mine), tuple(scale * one[key] for one in theirs))

    return [
        agreement("output tokens/s", [one.tokens_per_s for one in own], "output_throughput"),
        agreement("TTFT p50, s", [one.ttft.p50 if one.ttft else 0.0 for one in own], "median_ttft_ms", 1e-3),
        agreement("TPOT p50, s", [one.tpot.p50 if one.tpot else 0.0 for one in own], "median_tpot_ms", 1e-3),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 if all bars are reached, 1 otherwise."""
    parser = argparse.ArgumentParser(prog="bench-loadgen", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=100_000, help="per round (default: 100000)")
    parser.add_argument("--against-vllm", action="store_true", help="compare with vLLM's bench serve instead")
    parser.add_argument("--url", help="with --against-vllm: a running server (default: the stub)")
    parser.add_argument("--model", default=MODEL, help="with --url: the model's name")
    parser.add_argument("--tokenizer", type=Path, help="with --url: the folder of the model's tokenizer")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    if arguments.url and not (arguments.against_vllm and arguments.tokenizer):
        parser.error("--url needs --against-vllm and --tokenizer")
    try:
        if arguments.against_vllm:
            return _report_agreement(arguments, argv)
        return _report_speed(arguments, argv)
    except LoadgenError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1


def _report_speed(arguments: argparse.Namespace, argv: Sequence[str] | None) -> int:
    figures = measure_speed(arguments.rounds, arguments.tokens)
    rows = [
        (one.what, f"{one.tokens_per_s:.0f}", f"{one.by_cpu:.0f}", f"{one.ratio:.2f}", f"{1000 * one.itl_p50:.2f}")
        for one in figures
    ]
    head = ("tokens arrive", "tokens/s", "per CPU second", "of the bar", "ITL p50 ms")
    print(table([head, *rows], right={1, 2, 3, 4}))
    results = {"bar": BAR, "figures": [{**asdict(one), "ratio": one.ratio} for one in figures]}
    print(f"all figures are in {save(arguments.out, 'loadgen', 'bench.loadgen', argv, results)}")
    return 0 if all(one.ratio >= 1 for one in figures) else 1


def _report_agreement(arguments: argparse.Namespace, argv: Sequence[str] | None) -> int:
    requests = max(STREAMS, arguments.tokens // OUTPUT)
    if arguments.url:
        found = compare_with_vllm(arguments.url, arguments.model, arguments.tokenizer, arguments.rounds, requests)
    else:
        with (
            tempfile.TemporaryDirectory(prefix="preft-bench-") as folder,
            stub_server(PACES["each token alone"]) as url,
        ):
            make_model(Path(folder), loras=0, refts=0)
            found = compare_with_vllm(url, MODEL, Path(folder) / "model", arguments.rounds, requests)
    rows = [
        (one.what, f"{statistics.median(one.ours):.4g}", f"{statistics.median(one.vllm):.4g}", f"{one.ratio:.3f}")
        for one in found
    ]
    print(table([("", "preft loadgen", "vLLM bench serve", "ratio"), *rows], right={1, 2, 3}))
    results = {"agreement": AGREEMENT, "figures": [{**asdict(one), "ratio": one.ratio} for one in found]}
    print(f"all figures are in {save(arguments.out, 'loadgen-vllm', 'bench.loadgen', argv, results)}")
    return 0 if all(abs(one.ratio - 1) <= AGREEMENT for one in found) else 1


if __name__ == "__main__":
    sys.exit(main())
