"""Decode speed: a decode worker, reached over gRPC with KV that prefill workers pushed, against plain vLLM.

Measures the steady state (`steady_rate`): all requests decode, without prefill, KV transfer or start-up on either side.
PreFT's tokens are counted at a gRPC client, the reference's at AsyncLLM in its own process.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from bench.comparison import Comparison, Side, steady_rate, take_turns
from bench.rig import SLOTS, VOCABULARY, Rig
from preft.core.request import AdapterRef, Sampling
from preft.router.decode_stream import DecodeStream
from preft.rpc import common_pb2, workers_pb2, workers_pb2_grpc
from preft.rpc.convert import adapter_to_proto, sampling_to_proto
from preft.rpc.secret import ClusterChannel
from preft_loadgen.traffic.lengths import Lengths
from preft_loadgen.traffic.prompts import Ids, RandomPrompts
from preft_loadgen.traffic.request import Request
from preft_loadgen.traffic.workload import Workload

REQUESTS = 64  # at once
PROMPT, OUTPUT = 32, 64  # tokens
ADAPTER_COUNTS = (1, 64)
SIDES = 1 + len(ADAPTER_COUNTS)
BAR = 0.95
HOW = (
    f"{REQUESTS} requests at once, {PROMPT} prompt and {OUTPUT} output tokens, greedy; tokens per second from the time "
    "all requests have their first decoded token until the first request ends; ours: as received over gRPC from the "
    "decode worker; reference: vLLM's AsyncLLM in its own process, no adapters, equal engine settings"
)
TIMEOUT = 120.0


@dataclass(frozen=True, slots=True)
class Prefilled:
    """A prompt whose KV waits at the decode worker under `handle`, and its first token."""

    request: Request
    digest: str
    handle: str
    first_token: int


async def compare_decode(rig: Rig, rounds: int, step: Callable[[], None]) -> list[Comparison]:
    """One comparison per adapter count. Calls `step` after each of `turns(SIDES, rounds)` measurements."""
    adapters = {adapter.name: adapter for adapter in rig.adapters}
    async with (
        ClusterChannel(rig.prefill, rig.secret) as to_prefill,
        ClusterChannel(rig.decode, rig.secret) as to_decode,
    ):
        prefill = workers_pb2_grpc.PrefillWorkerStub(to_prefill)  # type: ignore[no-untyped-call]
        decode = DecodeStream(
            workers_pb2_grpc.DecodeWorkerStub(to_decode),  # type: ignore[no-untyped-call]
            rig.decode,
            lambda: None,
        )

        async def plain(number: int) -> float:
            run = await rig.plain.run([request.ids for request in _requests(("",), number)], OUTPUT, REQUESTS)
            return steady_rate([times[1:] for times in run.arrivals])  # prefill made the first token

        async def ours(count: int, number: int) -> float:
            requests = _requests(tuple(sorted(adapters)[:count]), number)
            slots = asyncio.Semaphore(SLOTS)  # the worker refuses a prompt under one more adapter

            async def prefilled(request: Request) -> Prefilled:
                async with slots:
                    return await _prefill(prefill, request, adapters[request.model], rig.decode)

            ready = await asyncio.gather(*map(prefilled, requests))
            return steady_rate(await asyncio.gather(*(_decode(decode, one) for one in ready)))

        sides: list[Side[float]] = [plain, *(partial(ours, count) for count in ADAPTER_COUNTS)]
        reference, *speeds = await take_turns(sides, rounds, step)
        await decode.close()
    return [
        Comparison(f"decode, {count} adapter{'s' if count > 1 else ''}", "tokens/s", measured, reference, BAR, HOW)
        for count, measured in zip(ADAPTER_COUNTS, speeds, strict=True)
    ]


def _requests(models: Sequence[str], seed: int) -> list[Request]:
    prompts = RandomPrompts(Lengths(PROMPT, PROMPT), Lengths(OUTPUT, OUTPUT), Ids(VOCABULARY))
    return Workload(tuple(models), REQUESTS, prompts, seed=seed).make()


async def _prefill(
    stub: workers_pb2_grpc.PrefillWorkerStub, request: Request, adapter: AdapterRef, target: str
) -> Prefilled:
    """Sends one prompt through a prefill worker; its KV goes to the decode worker at `target`."""
    handle = uuid.uuid4().hex
    call = stub.Prefill(
        workers_pb2.PrefillRequest(
            request_id=handle,
            prompt_token_ids=request.ids,
            sampling=_sampling(request),
            adapter=adapter_to_proto(adapter),
            n=1,
            target=workers_pb2.KvTarget(address=target, handle=handle),
        ),
        timeout=TIMEOUT,
    )
    first_token = None
    async for event in call:
        if event.HasField("first_tokens"):
            first_token = event.first_tokens.choices[0].token_ids[0]
    assert first_token is not None
    return Prefilled(request, adapter.digest, handle, first_token)


async def _decode(stream: DecodeStream, ready: Prefilled) -> list[float]:
    """Arrival times of the decoded tokens, in seconds."""
    [call] = stream.start(
        workers_pb2.DecodeRequest(
            request_id=ready.handle,
            handle=ready.handle,
            prompt_token_ids=ready.request.ids,
            sampling=_sampling(ready.request),
            adapter_digest=ready.digest,
            kv_timeout=TIMEOUT,
            choices=[workers_pb2.DecodeChoice(output_token_ids=[ready.first_token])],
        ),
        timeout=TIMEOUT,
    )
    arrivals: list[float] = []
    finished = False
    while not finished:
        delta = await call.read()
        arrivals += [time.perf_counter()] * len(delta.token_ids)
        finished = bool(delta.finish_reason)
    assert len(arrivals) == ready.request.output_tokens - 1
    return arrivals


def _sampling(request: Request) -> common_pb2.Sampling:
    return sampling_to_proto(Sampling(max_tokens=request.output_tokens, temperature=0.0, ignore_eos=True))
