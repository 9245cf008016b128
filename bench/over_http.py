"""End to end: completions streamed over HTTP through gateway, router and both workers, against AsyncLLM alone.

Measures output tokens per second from the first request to the end of the last one, prefill included. PreFT's client is
a process of its own on the same machine; the reference has no client.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from bench.comparison import Comparison, take_turns
from bench.plain import PlainEngine
from bench.rig import MODEL_NAME, VOCABULARY, Rig
from preft.core.errors import PreftError
from preft_loadgen.measure.driver import closed_loop
from preft_loadgen.measure.record import Run
from preft_loadgen.traffic.lengths import Lengths
from preft_loadgen.traffic.prompts import Ids, RandomPrompts
from preft_loadgen.traffic.request import Request
from preft_loadgen.traffic.workload import Workload
from preft_loadgen.transport.server import Send, completions

REQUESTS, CONCURRENCY = 64, 32
PROMPT, OUTPUT = 64, 128  # tokens
ADAPTERS = 8
SIDES = 4
BAR = 0.8
HOW = (
    f"{REQUESTS} requests, {CONCURRENCY} at a time, {PROMPT} prompt and {OUTPUT} output tokens, greedy; output tokens "
    "over the whole time, prefill included; ours: as an HTTP client receives them from the whole cluster; reference: "
    "vLLM's AsyncLLM called in its own process, no HTTP, no detokenizing, "
)


async def compare_http(rig: Rig, rounds: int, step: Callable[[], None]) -> list[Comparison]:
    """Compares the base model, then adapters. Calls `step` after each of `turns(SIDES, rounds)` measurements.

    Raises PreftError if any request fails.
    """
    send = completions(rig.http)
    paths = {adapter.name: adapter.source for adapter in rig.adapters}
    some = [adapter.name for adapter in rig.adapters[:ADAPTERS]]
    assert rig.multi_lora is not None

    async def direct(engine: PlainEngine, models: Sequence[str], number: int) -> float:
        requests = _requests(models, number)
        prompts, adapters = [one.ids for one in requests], [paths.get(one.model) for one in requests]
        run = await engine.run(prompts, OUTPUT, CONCURRENCY, adapters)
        return run.tokens / run.seconds

    async def ours(models: Sequence[str], number: int) -> float:
        run = await run_all(send, _requests(models, number), CONCURRENCY)
        return sum(record.tokens for record in run.records) / run.seconds

    base, ours_base, lora, ours_lora = await take_turns(
        [
            partial(direct, rig.plain, [MODEL_NAME]),
            partial(ours, [MODEL_NAME]),
            partial(direct, rig.multi_lora, some),
            partial(ours, some),
        ],
        rounds,
        step,
    )
    return [
        Comparison("HTTP streaming, base model", "tokens/s", ours_base, base, BAR, f"{HOW}adapters off"),
        Comparison(
            f"HTTP streaming, {ADAPTERS} adapters",
            "tokens/s",
            ours_lora,
            lora,
            BAR,
            f"{HOW}the same adapters by its multi-LoRA (prompt and output)",
        ),
    ]


async def run_all(send: Send, requests: Sequence[Request], concurrency: int) -> Run:
    """`closed_loop`, but raises PreftError if any request fails."""
    run = await closed_loop(send, requests, concurrency)
    if errors := [record.error for record in run.records if record.error is not None]:
        raise PreftError(f"{len(errors)} requests failed, the first with: {errors[0]}")
    return run


def _requests(models: Sequence[str], seed: int) -> list[Request]:
    prompts = RandomPrompts(Lengths(PROMPT, PROMPT), Lengths(OUTPUT, OUTPUT), Ids(VOCABULARY))
    seed += 10_000  # other prompts than in the decode runs
    return Workload(tuple(models), REQUESTS, prompts, seed=seed).make()
