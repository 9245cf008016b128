"""Sends a workload and records the replies: with a fixed number of requests in flight, or at fixed times.

Knows no transport: `send` makes one request. Failed requests are recorded, not raised.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from preft_loadgen.errors import LoadgenError
from preft_loadgen.http_stream import HttpClient, Reply
from preft_loadgen.workload import Request

Send = Callable[[Request], Awaitable[Reply]]
OnDone = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Record:
    """One request, in seconds as its client sees them. `started` counts from the run's start.

    `gaps` are the times between arrivals of text; texts that come together are one arrival. A failed request has an
    `error` and no tokens.
    """

    model: str
    started: float
    seconds: float
    ttft: float = 0.0
    gaps: tuple[float, ...] = ()
    tokens: int = 0
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Run:
    """All records, and the seconds from the first request to the end of the last."""

    records: tuple[Record, ...]
    seconds: float


def completions(client: HttpClient) -> Send:
    """Sends requests to /v1/completions: greedy, with exactly the wanted output length."""

    async def send(request: Request) -> Reply:
        body = {
            "model": request.model,
            "prompt": request.prompt,
            "max_tokens": request.output_tokens,
            "temperature": 0,
            "ignore_eos": True,
        }
        return await client.stream("/v1/completions", body)

    return send


async def closed_loop(send: Send, requests: Sequence[Request], concurrency: int, on_done: OnDone | None = None) -> Run:
    """Simulates `concurrency` clients. Each client sends its next request after the end of its last one."""
    begin = time.perf_counter()
    records: list[Record] = []
    waiting = iter(requests)

    async def client() -> None:
        for request in waiting:
            records.append(await _one(send, request, begin, time.perf_counter()))
            if on_done is not None:
                on_done()

    async with asyncio.TaskGroup() as group:
        for _ in range(min(concurrency, len(requests))):
            group.create_task(client())
    return Run(tuple(records), time.perf_counter() - begin)


async def open_loop(
    send: Send, requests: Sequence[Request], arrivals: Sequence[float], on_done: OnDone | None = None
) -> Run:
    """Sends each request at its time, however many requests still run. A late start counts as waiting time."""
    begin = time.perf_counter()
    records: list[Record] = []

    async def client(request: Request, due: float) -> None:
        records.append(await _one(send, request, begin, due))
        if on_done is not None:
            on_done()

    async with asyncio.TaskGroup() as group:
        for request, arrival in zip(requests, arrivals, strict=True):
            due = begin + arrival
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            group.create_task(client(request, due))
    return Run(tuple(records), time.perf_counter() - begin)


async def _one(send: Send, request: Request, begin: float, due: float) -> Record:
    try:
        reply = await send(request)
    except LoadgenError as error:
        return Record(request.model, due - begin, time.perf_counter() - due, error=str(error))
    if reply.tokens != request.output_tokens:
        error_text = f"{reply.tokens} tokens came where {request.output_tokens} were asked for"
        return Record(request.model, due - begin, reply.ended - due, error=error_text)
    first = reply.arrivals[0] if reply.arrivals else reply.ended  # an answer may have no visible text
    return Record(
        model=request.model,
        started=due - begin,
        seconds=reply.ended - due,
        ttft=first - due,
        gaps=tuple(later - earlier for earlier, later in pairwise(reply.arrivals) if later > earlier),
        tokens=reply.tokens,
    )
