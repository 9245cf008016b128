"""When tokens reach a client: `python -m bench.latency`.

The first and second token of one request at a time, disaggregated against colocated; and the gaps between the tokens of
streams, against vLLM's AsyncLLM called in its own process with the same requests. Equal engines, the base model.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import os
import statistics
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

from bench.command import bench_folder, say
from bench.comparison import Comparison, comparison_table, take_turns, turns
from bench.over_http import run_all
from bench.plain import PlainEngine, plain_engine
from bench.random_model import SMALL, write_model
from bench.saving import RESULTS, save
from preft_loadgen.measure.record import bursts
from preft_loadgen.report.metrics import percentile
from preft_loadgen.report.progress import progress
from preft_loadgen.served import served
from preft_loadgen.traffic.lengths import Lengths
from preft_loadgen.traffic.prompts import Ids, RandomPrompts
from preft_loadgen.traffic.request import Request
from preft_loadgen.traffic.workload import Workload
from preft_loadgen.transport.http import HttpClient
from preft_loadgen.transport.server import Send, completions

MODES = ("disaggregated", "colocated")
NAME = "base"
READY_SECONDS = 600.0
STREAMS, STREAM_PROMPT, STREAM_TOKENS, STREAM_REQUESTS = 16, 64, 128, 48
FIRST_BAR, GAP_BAR = 1 / 1.1, 1 / 1.5
ALONE = "one request at a time; medians; the inverse of the time from sending the request"
GAPS = (
    f"inverse of the p99 of all gaps between bursts of tokens; {STREAM_REQUESTS} requests, {STREAMS} at a time, "
    f"{STREAM_PROMPT} prompt and {STREAM_TOKENS} output tokens; reference: gaps between the outputs of vLLM's AsyncLLM"
)


def _settings(model: Path, length: int, mode: str) -> dict[str, Any]:
    engine = {"max_num_seqs": STREAMS, "max_num_batched_tokens": 2048, "kv_cache_bytes": 512 << 20}
    roles = {"prefill": engine} if mode == "colocated" else {"prefill": engine, "decode": engine}
    return {
        "model": str(model),
        "served_model_name": NAME,
        "max_model_len": length,
        "colocated": mode == "colocated",
        **roles,
    }


@asynccontextmanager
async def _servers(folder: Path, length: int) -> AsyncIterator[tuple[dict[str, Send], PlainEngine]]:
    model = folder / "model"
    write_model(model, model=dataclasses.replace(SMALL, positions=length))
    os.environ["VLLM_CPU_NUM_OF_RESERVED_CPU"] = "0"  # as in PreFT's engines: all cores compute
    sends = {}
    async with AsyncExitStack() as stack:
        for mode in MODES:
            say(f"starting the {mode} cluster")
            config = folder / f"{mode}.json"
            config.write_text(json.dumps(_settings(model, length, mode)))  # JSON is YAML
            arguments, log, state = ["--config", str(config)], folder / f"{mode}.log", folder / f"{mode}-state"
            server = stack.enter_context(served(arguments, state_dir=state, log=log, ready_seconds=READY_SECONDS))
            sends[mode] = completions(HttpClient(server.url))
        say("starting plain vLLM")
        config = folder / f"{MODES[0]}.json"
        yield sends, await stack.enter_async_context(plain_engine(config, folder / "plain.log"))


def _requests(count: int, prompt: int, output: int, seed: int) -> list[Request]:
    prompts = RandomPrompts(Lengths(prompt, prompt), Lengths(output, output), Ids(SMALL.vocabulary))
    return Workload((NAME,), count, prompts, seed=seed).make()


async def _alone(send: Send, prompt: int, count: int, number: int) -> tuple[float, float]:
    """Medians of the time to the first and to the second token."""
    run = await run_all(send, _requests(count, prompt, 2, number + 1000 * prompt), 1)
    first = [record.ttft for record in run.records]
    second = [record.ttft + sum(record.gaps) for record in run.records]
    return statistics.median(first), statistics.median(second)


async def _streams(send: Send, number: int) -> float:
    run = await run_all(send, _requests(STREAM_REQUESTS, STREAM_PROMPT, STREAM_TOKENS, number), STREAMS)
    return percentile([gap for record in run.records for gap in record.gaps], 99)


async def _plain_streams(engine: PlainEngine, number: int) -> float:
    requests = _requests(STREAM_REQUESTS, STREAM_PROMPT, STREAM_TOKENS, number)
    run = await engine.run([request.ids for request in requests], STREAM_TOKENS, STREAMS)
    return percentile([gap for times in run.arrivals for gap in bursts(times, [1] * len(times))[0]], 99)


async def _measure(arguments: argparse.Namespace, folder: Path) -> list[Comparison]:
    compared = []
    rounds = arguments.rounds
    async with _servers(folder, max(arguments.prompts) + STREAM_TOKENS) as (sends, plain):
        for prompt in arguments.prompts:
            sides = [partial(_alone, sends[mode], prompt, arguments.requests) for mode in MODES]
            with progress(f"prompts of {prompt}", turns(len(sides), rounds)) as bar:
                ours, reference = await take_turns(sides, rounds, bar.update)
            for place, (what, least) in enumerate((("first", FIRST_BAR), ("second", 0.0))):
                pair = _inverse([times[place] for times in ours]), _inverse([times[place] for times in reference])
                name = f"{what} token after {prompt} prompt tokens, disaggregated / colocated"
                compared.append(Comparison(name, "1/s", *pair, least, ALONE))
        streams = [partial(_plain_streams, plain), *(partial(_streams, sends[mode]) for mode in MODES)]
        with progress("streams", turns(len(streams), rounds)) as bar:
            direct, *clients = await take_turns(streams, rounds, bar.update)
        for mode, gaps in zip(MODES, clients, strict=True):
            pair = _inverse(gaps), _inverse(direct)
            compared.append(Comparison(f"p99 of gaps, {mode} / AsyncLLM", "1/s", *pair, GAP_BAR, GAPS))
    return compared


def _inverse(times: Sequence[float]) -> tuple[float, ...]:
    return tuple(1 / seconds for seconds in times)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 if everything was measured, whatever the figures; a measurement that fails ends the process."""
    parser = argparse.ArgumentParser(prog="bench-latency", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each figure (default: 5)")
    parser.add_argument("--prompts", type=_lengths, default=(512, 2048), help="prompt lengths (default: 512,2048)")
    parser.add_argument("--requests", type=int, default=5, help="of each length in each round (default: 5)")
    parser.add_argument("--out", metavar="DIR", type=Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    with bench_folder() as folder:
        comparisons = asyncio.run(_measure(arguments, folder))
    print(comparison_table(comparisons))
    figures = {"comparisons": [one.as_json() for one in comparisons]}
    print(f"all figures are in {save(arguments.out, 'latency', 'bench.latency', argv, figures)}")
    return 0


def _lengths(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


if __name__ == "__main__":
    sys.exit(main())
