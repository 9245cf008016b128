"""Prefill speed under adapters: prompts through a prefill worker over gRPC, against the base model on the same worker.

Measures from the first prompt sent to the last first token. No KV is transferred.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from functools import partial

from bench.comparison import Comparison, Side, take_turns
from bench.decode import prefill_once
from bench.rig import LORA_RANK, REFT_RANK, VOCABULARY, Rig
from preft.core.request import AdapterRef
from preft.rpc import workers_pb2_grpc
from preft.rpc.secret import ClusterChannel
from preft_loadgen.workload import Lengths, Workload

REQUESTS, PROMPT = 32, 256  # at once; tokens
REFT_COUNTS = (1, 8, 32)
LORA_COUNTS = (16,)
SIDES = 1 + len(REFT_COUNTS) + len(LORA_COUNTS)
REFT_BAR, LORA_BAR = 0.95, 0.8
HOW = (
    f"{REQUESTS} prompts of {PROMPT} tokens at once, each under the next of the adapters; prompt tokens per second "
    "from the first request to the last first token; both sides over gRPC from the same prefill worker with 8 adapter "
    f"slots; reference: the base model; ReFT of rank {REFT_RANK} after all layers, LoRA of rank {LORA_RANK} on "
    "all linear layers"
)


async def compare_prefill(rig: Rig, rounds: int, step: Callable[[], None]) -> list[Comparison]:
    """One comparison per kind and number of adapters. Calls `step` after each of `turns(SIDES, rounds)` runs."""
    reft = [adapter for adapter in rig.adapters if adapter.name.startswith("r")]
    lora = [adapter for adapter in rig.adapters if adapter.name.startswith("a")]
    async with ClusterChannel(rig.prefill, rig.secret) as channel:
        stub = workers_pb2_grpc.PrefillWorkerStub(channel)  # type: ignore[no-untyped-call]

        async def speed(adapters: Sequence[AdapterRef | None], number: int) -> float:
            lengths = Lengths(PROMPT, PROMPT), Lengths(1, 1)
            seed = 20_000 + number * 100 + len(adapters)  # new prompts: none is in a prefix cache
            requests = Workload(("",), REQUESTS, *lengths, seed=seed, vocabulary=VOCABULARY).make()
            started = time.perf_counter()
            await asyncio.gather(
                *(prefill_once(stub, one, adapters[i % len(adapters)]) for i, one in enumerate(requests))
            )
            return REQUESTS * PROMPT / (time.perf_counter() - started)

        sides: list[Side] = [
            partial(speed, [None]),
            *(partial(speed, reft[:count]) for count in REFT_COUNTS),
            *(partial(speed, lora[:count]) for count in LORA_COUNTS),
        ]
        base, *speeds = await take_turns(sides, rounds, step)
    kinds = [("ReFT", count, REFT_BAR) for count in REFT_COUNTS] + [("LoRA", count, LORA_BAR) for count in LORA_COUNTS]
    return [
        Comparison(f"prefill, {count} {kind} adapter{'s' if count > 1 else ''}", "tokens/s", measured, base, bar, HOW)
        for (kind, count, bar), measured in zip(kinds, speeds, strict=True)
    ]
