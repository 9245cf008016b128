"""Part of `make bench-cluster`: many open streams on one gateway, and request bodies of 30 MB beside them.

Gateway, router and gRPC are real; `paced_workers` stand in for engines, which two cores couldn't run so many of.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from bench.command import bench_folder
from bench.paced_gateway import paced_gateway
from bench.paced_workers import FIRST_WORD, PACES
from bench.rig import MODEL_NAME
from bench.saving import RESULTS, save
from preft.cluster.process import raise_file_limit
from preft.core.errors import PreftError
from preft_loadgen.errors import RequestFailed
from preft_loadgen.measure.driver import open_loop
from preft_loadgen.report.metrics import percentile
from preft_loadgen.served import Served
from preft_loadgen.table import table
from preft_loadgen.traffic.request import Request
from preft_loadgen.transport.http import HttpClient
from preft_loadgen.transport.server import completions

FEW, MANY = 100, 2000  # streams
RATE = 200.0  # streams opened per second
SECONDS = 30.0  # of each stream, unless an argument says otherwise
PROBE_SECONDS = 0.05  # between requests that measure how long the event loop is blocked
BODY_BYTES = 30 * 10**6
SLOW_SECONDS = 10.0  # for one body
GAP_BOUND = 0.5  # seconds by which a 30 MB body may delay a token
PACE, FAST_PACE = PACES[FIRST_WORD], PACES[FIRST_WORD + 1]
Beside = Callable[[], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Figures:
    """One run, in seconds. `late` is by how much a gap between tokens was longer than the pace of the engine."""

    what: str
    streams: int
    ttft_p50: float
    ttft_p99: float
    late_p50: float
    late_p99: float
    late_max: float
    health_p99: float
    health_max: float
    memory: int  # most resident bytes of the gateway


class Watch:
    """Asks /health and reads the gateway's memory until it is cancelled."""

    def __init__(self, client: HttpClient, pid: int) -> None:
        self._client, self._pid = client, pid
        self.seconds: list[float] = []
        self.memory = 0

    async def look(self) -> None:
        while True:
            started = time.perf_counter()
            await self._client.get_json("/health")
            self.seconds.append(time.perf_counter() - started)
            self.memory = max(self.memory, resident_bytes(self._pid))
            await asyncio.sleep(PROBE_SECONDS)


def resident_bytes(pid: int) -> int:
    """Memory of the process that is in RAM."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


async def _run(
    server: Served, what: str, streams: int, seconds: float, token: int, beside: Beside | None = None
) -> Figures:
    """Opens the streams one after the other, then runs `beside` while all are open."""
    client, pace = HttpClient(server.url), PACES[token]
    requests = [
        Request(MODEL_NAME, (token, FIRST_WORD + number % 1000), round(seconds / pace)) for number in range(streams)
    ]
    watch = Watch(client, server.pid)
    looking = asyncio.create_task(watch.look())
    arrivals = [number / RATE for number in range(streams)]
    running = asyncio.create_task(open_loop(completions(client), requests, arrivals))
    if beside is not None:
        await asyncio.sleep(arrivals[-1] + 1)
        await beside()
    run = await running
    looking.cancel()
    await asyncio.gather(looking, return_exceptions=True)
    if errors := [record.error for record in run.records if record.error is not None]:
        raise PreftError(f"{len(errors)} of {streams} streams failed, the first with: {errors[0]}")
    ttfts = [record.ttft for record in run.records]
    late = [gap - pace for record in run.records for gap in record.gaps[1:]]  # the first gap is the hand-over's
    return Figures(
        what,
        streams,
        ttft_p50=percentile(ttfts, 50),
        ttft_p99=percentile(ttfts, 99),
        late_p50=percentile(late, 50),
        late_p99=percentile(late, 99),
        late_max=max(late),
        health_p99=percentile(watch.seconds, 99),
        health_max=max(watch.seconds),
        memory=watch.memory,
    )


def _bodies() -> dict[str, bytes]:
    """Bodies of 30 MB: a prompt of text, and a prompt of token ids. Both are refused."""
    text = json.dumps({"model": MODEL_NAME, "prompt": "word " * (BODY_BYTES // 5)})
    ids = json.dumps({"model": MODEL_NAME, "prompt": [4321] * (BODY_BYTES // 6)})
    return {"text": text.encode(), "token ids": ids.encode()}


async def _post(server: Served, body: bytes, seconds: float) -> None:
    """Sends the body within `seconds` (0: at once). Raises PreftError unless the gateway refuses the long prompt."""
    address = urlsplit(server.url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    head = f"POST /v1/completions HTTP/1.1\r\nhost: {address.netloc}\r\ncontent-type: application/json\r\n"
    writer.write(f"{head}content-length: {len(body)}\r\nconnection: close\r\n\r\n".encode())
    pieces = 100 if seconds else 1
    size = -(-len(body) // pieces)
    for start in range(0, len(body), size):
        writer.write(body[start : start + size])
        await writer.drain()
        await asyncio.sleep(seconds / pieces)
    answer = await reader.read()
    writer.close()
    if not answer.startswith(b"HTTP/1.1 413 "):
        raise RequestFailed(f"a prompt of 30 MB was answered with {answer[:60]!r}")


async def _measure(server: Served, few: int, many: int, seconds: float) -> list[Figures]:
    runs = [await _run(server, "streams", streams, seconds, FIRST_WORD) for streams in (few, few, many)][1:]
    fast = FIRST_WORD + 1
    runs.append(await _run(server, "10 tokens/s each", few, seconds, fast))
    for name, body in _bodies().items():

        async def at_once(body: bytes = body) -> None:
            for _ in range(5):
                await _post(server, body, 0)

        async def slowly(body: bytes = body) -> None:
            await _post(server, body, SLOW_SECONDS)

        runs.append(await _run(server, f"beside 5 bodies of {name}", few, seconds, fast, at_once))
        runs.append(await _run(server, f"beside a slow body of {name}", few, seconds, fast, slowly))
    return runs


def figures_table(runs: Sequence[Figures]) -> str:
    """One line per run, times in milliseconds."""
    head = ["", "streams", "TTFT p50 ms", "p99", "late p50 ms", "p99", "max", "/health p99 ms", "max", "memory MiB"]
    rows = [
        [
            run.what,
            str(run.streams),
            *(
                f"{1000 * value:.1f}"
                for value in (
                    *(run.ttft_p50, run.ttft_p99, run.late_p50, run.late_p99, run.late_max),
                    *(run.health_p99, run.health_max),
                )
            ),
            str(run.memory >> 20),
        ]
        for run in runs
    ]
    return table([head, *rows], right=range(1, len(head)))


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 if no stream failed and no 30 MB body delayed a token beyond the bound; 1 otherwise."""
    parser = argparse.ArgumentParser(prog="bench-streams", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--few", type=int, default=FEW, help=f"streams that many are compared with (default: {FEW})")
    parser.add_argument("--many", type=int, default=MANY, help=f"default: {MANY}")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"of each stream (default: {SECONDS:g})")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    raise_file_limit()
    with bench_folder() as folder, paced_gateway(folder, MANY) as server:
        runs = asyncio.run(_measure(server, arguments.few, arguments.many, arguments.seconds))
    print(figures_table(runs))
    facts: dict[str, Any] = {"pace": PACE, "fast_pace": FAST_PACE, "gap_bound": GAP_BOUND}
    path = save(arguments.out, "streams", "bench.streams", argv, {**facts, "runs": [asdict(run) for run in runs]})
    print(f"late: by how much a token came later than the engine's pace; all figures are in {path}")
    worst = max(run.late_max for run in runs if "bod" in run.what)
    print(f"longest delay of a token beside 30 MB bodies: {worst:.3f} s, the bound is {GAP_BOUND} s")
    return 0 if worst <= GAP_BOUND else 1


if __name__ == "__main__":
    sys.exit(main())
