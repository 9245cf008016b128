"""Sends requests and records the answers: with a fixed number of conversations in flight, or at fixed times.

Knows no transport: `send` makes one request. Failed requests are recorded, not raised.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

from preft_loadgen.errors import LoadgenError, RequestFailed
from preft_loadgen.measure.record import Record, Run, failed, recorded
from preft_loadgen.traffic.request import Prompt, Request
from preft_loadgen.transport.reply import Reply
from preft_loadgen.transport.server import Send

OnRecord = Callable[[Record], None]


def _ignore(_: Record) -> None:
    pass


async def closed_loop(send: Send, requests: Sequence[Request], concurrency: int, on_record: OnRecord = _ignore) -> Run:
    """Simulates `concurrency` clients. Each client begins its next conversation after the end of its last one."""
    begin = time.perf_counter()
    records: list[Record] = []
    waiting = iter(requests)

    async def client() -> None:
        for request in waiting:
            await _converse(send, request, begin, time.perf_counter(), records, on_record)

    async with asyncio.TaskGroup() as group:
        for _ in range(min(concurrency, len(requests))):
            group.create_task(client())
    return Run(tuple(records), time.perf_counter() - begin)


async def open_loop(
    send: Send, requests: Sequence[Request], arrivals: Sequence[float], on_record: OnRecord = _ignore
) -> Run:
    """Begins each conversation at its time, in seconds after the start, however many requests still run."""
    begin = time.perf_counter()
    records: list[Record] = []
    async with asyncio.TaskGroup() as group:
        for request, arrival in zip(requests, arrivals, strict=True):
            due = begin + arrival
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            group.create_task(_converse(send, request, begin, due, records, on_record))
    planned = len(arrivals) / arrivals[-1] if arrivals and arrivals[-1] > 0 else None
    return Run(tuple(records), time.perf_counter() - begin, planned)


async def _converse(
    send: Send, request: Request, begin: float, due: float, records: list[Record], on_record: OnRecord
) -> None:
    """Sends a request and the later turns of its conversation, each after the answer to the last one."""
    while True:
        sent = time.perf_counter()
        try:
            reply = await send(request)
            record = recorded(request, reply, begin, due, sent)
            following = request.after(_answer(request, reply)) if request.later else None
        except LoadgenError as error:
            record, following = failed(request, error, begin, due, sent, time.perf_counter()), None
        records.append(record)
        on_record(record)
        if following is None:
            return
        request, due = following, time.perf_counter()


def _answer(request: Request, reply: Reply) -> Prompt:
    """The answer as a part of the next prompt."""
    if isinstance(request.prompt, str):
        return reply.text
    if len(reply.token_ids) != reply.tokens:
        raise RequestFailed(
            "the server sent no token ids, which the next turn's prompt needs: try text", kind="malformed"
        )
    return reply.token_ids
