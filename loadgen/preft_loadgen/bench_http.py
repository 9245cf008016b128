"""End to end: completions streamed over HTTP through gateway, router and both workers, against AsyncLLM alone.

Measured is the whole: output tokens over the seconds from the first request to the end of the last, prefill included.
The client of ours is a process of its own on the same machine; the reference has none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from preft.core.errors import PreftError
from preft_loadgen.bench_rig import MODEL_NAME, VOCABULARY, Rig
from preft_loadgen.comparison import Comparison, take_turns
from preft_loadgen.driver import closed_loop, completions
from preft_loadgen.workload import Lengths, Request, Workload

REQUESTS, CONCURRENCY = 64, 32
PROMPT, OUTPUT = 64, 64  # tokens
ADAPTER_COUNTS = (0, 8)  # 0: the base model
SIDES = 1 + len(ADAPTER_COUNTS)
BAR = 0.8
HOW = (
    f"{REQUESTS} requests, {CONCURRENCY} at a time, {PROMPT} prompt and {OUTPUT} output tokens, greedy; output tokens "
    "over the whole time, prefill included; ours: as an HTTP client receives them from the whole cluster; reference: "
    "vLLM's AsyncLLM called in its own process, no adapters, no HTTP, no detokenizing"
)


async def compare_http(rig: Rig, rounds: int, step: Callable[[], None]) -> list[Comparison]:
    """One comparison per adapter count. `step` is called after each of `turns(SIDES, rounds)` measurements.

    Raises PreftError if any request fails.
    """
    send = completions(rig.http)

    async def direct(number: int) -> float:
        run = await rig.plain.run([request.prompt for request in _requests(("",), number)], OUTPUT, CONCURRENCY)
        return run.tokens / run.seconds

    async def ours(count: int, number: int) -> float:
        models = [adapter.name for adapter in rig.adapters[:count]] or [MODEL_NAME]
        run = await closed_loop(send, _requests(models, number), CONCURRENCY)
        if errors := [record.error for record in run.records if record.error is not None]:
            raise PreftError(f"{len(errors)} requests failed, the first with: {errors[0]}")
        return sum(record.tokens for record in run.records) / run.seconds

    reference, *speeds = await take_turns([direct, *(partial(ours, count) for count in ADAPTER_COUNTS)], rounds, step)
    return [
        Comparison(
            f"HTTP streaming, {f'{count} adapters' if count else 'base model'}",
            "tokens/s",
            measured,
            reference,
            BAR,
            HOW,
        )
        for count, measured in zip(ADAPTER_COUNTS, speeds, strict=True)
    ]


def _requests(models: Sequence[str], seed: int) -> list[Request]:
    lengths = Lengths(PROMPT, PROMPT), Lengths(OUTPUT, OUTPUT)
    seed += 10_000  # not the prompts of the decode runs
    return Workload(tuple(models), REQUESTS, *lengths, seed=seed, vocabulary=VOCABULARY).make()
