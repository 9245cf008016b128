"""Prefill speed under adapters: completions of one token over HTTP, against the base model on the same cluster.

Measures from the first prompt sent to the last reply. The first token is the last one, so no KV is transferred.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from bench.comparison import Comparison, Side, take_turns
from bench.over_http import run_all
from bench.rig import LORA_RANK, MODEL_NAME, REFT_RANK, SLOTS, VOCABULARY, Rig
from preft_loadgen.traffic.lengths import Lengths
from preft_loadgen.traffic.prompts import Ids, RandomPrompts
from preft_loadgen.traffic.workload import Workload
from preft_loadgen.transport.server import completions

REQUESTS, PROMPT = 32, 256  # at once; tokens
REFT_COUNTS = (1, 8, 32)
LORA_COUNTS = (16,)
SIDES = 1 + len(REFT_COUNTS) + len(LORA_COUNTS)
REFT_BAR, LORA_BAR = 0.95, 0.8
HOW = (
    f"{REQUESTS} prompts of {PROMPT} tokens at once, adapters equally often; prompt tokens per second from the first "
    f"request to the last first token; both sides over HTTP from the same prefill worker with {SLOTS} adapter slots; "
    f"reference: the base model; ReFT of rank {REFT_RANK} after all layers, LoRA of rank {LORA_RANK} on all linear "
    "layers"
)


async def compare_prefill(rig: Rig, rounds: int, step: Callable[[], None]) -> list[Comparison]:
    """One comparison per kind and number of adapters. Calls `step` after each of `turns(SIDES, rounds)` runs."""
    send = completions(rig.http)
    reft = [adapter.name for adapter in rig.adapters if adapter.name.startswith("r")]
    lora = [adapter.name for adapter in rig.adapters if adapter.name.startswith("a")]

    async def speed(models: Sequence[str], number: int) -> float:
        prompts = RandomPrompts(Lengths(PROMPT, PROMPT), Lengths(1, 1), Ids(VOCABULARY))
        seed = 20_000 + number * 100 + len(models)  # new prompts: none is in a prefix cache
        requests = Workload(tuple(models), REQUESTS, prompts, seed=seed).make()
        return REQUESTS * PROMPT / (await run_all(send, requests, REQUESTS)).seconds

    sides: list[Side[float]] = [
        partial(speed, [MODEL_NAME]),
        *(partial(speed, reft[:count]) for count in REFT_COUNTS),
        *(partial(speed, lora[:count]) for count in LORA_COUNTS),
    ]
    base, *speeds = await take_turns(sides, rounds, step)
    kinds = [("ReFT", count, REFT_BAR) for count in REFT_COUNTS] + [("LoRA", count, LORA_BAR) for count in LORA_COUNTS]
    return [
        Comparison(f"prefill, {count} {kind} adapter{'s' if count > 1 else ''}", "tokens/s", measured, base, bar, HOW)
        for (kind, count, bar), measured in zip(kinds, speeds, strict=True)
    ]
