"""One workload at several adapter counts against one server, for `preft loadgen` and the demo."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from preft_loadgen.driver import closed_loop, completions, open_loop
from preft_loadgen.errors import InvalidArgument
from preft_loadgen.http_stream import HttpClient, RequestFailed
from preft_loadgen.report import Progress, Summary, summarize
from preft_loadgen.workload import Lengths, Popularity, Workload, poisson_arrivals

WARM_UP = Lengths(2, 2)


@dataclass(frozen=True, slots=True)
class Sweep:
    """The load at each adapter count: with `rate` (requests per second) an open loop, else `concurrency` at once."""

    requests: int
    prompt: Lengths
    output: Lengths
    concurrency: int = 16
    rate: float | None = None
    popularity: Popularity = Popularity.UNIFORM
    seed: int = 0
    vocabulary: int = 256


async def served_models(client: HttpClient) -> tuple[str, tuple[str, ...]]:
    """The base model's name and the adapters' names, as /v1/models lists them. Raises RequestFailed."""
    cards = (await client.get_json("/v1/models"))["data"]
    bases = [card["id"] for card in cards if card.get("parent") is None]
    if not bases:
        raise RequestFailed("/v1/models lists no base model")
    return bases[0], tuple(card["id"] for card in cards if card.get("parent") is not None)


async def run_sweep(
    client: HttpClient, sweep: Sweep, counts: Sequence[int], *, force_progress: bool = False
) -> list[Summary]:
    """One summary per adapter count (0: the base model), in order. Each run starts with every adapter loaded.

    Raises InvalidArgument if the server has too few adapters, RequestFailed if it doesn't answer.
    """
    base, adapters = await served_models(client)
    if max(counts) > len(adapters):
        raise InvalidArgument(f"{max(counts)} adapters were asked for, the server has {len(adapters)}")
    send = completions(client)
    summaries = []
    for number, count in enumerate(counts):
        models = adapters[:count] if count else (base,)
        warm_up = Workload(models, len(models), WARM_UP, WARM_UP, seed=sweep.seed, vocabulary=sweep.vocabulary)
        await closed_loop(send, warm_up.make(), concurrency=min(len(models), sweep.concurrency))
        requests = Workload(
            models,
            sweep.requests,
            sweep.prompt,
            sweep.output,
            sweep.popularity,
            seed=sweep.seed * 1000 + number,  # new prompts for each count: none is in a cache
            vocabulary=sweep.vocabulary,
        ).make()
        label = f"{count} adapter{'' if count == 1 else 's'}" if count else "base model"
        with Progress(f"{label:11}", sweep.requests, force=force_progress) as progress:
            if sweep.rate is None:
                run = await closed_loop(send, requests, sweep.concurrency, progress.step)
            else:
                arrivals = poisson_arrivals(sweep.rate, sweep.requests, sweep.seed)
                run = await open_loop(send, requests, arrivals, progress.step)
        summaries.append(summarize(run, count))
    return summaries
