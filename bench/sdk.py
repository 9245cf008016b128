"""The client over gRPC against the client over HTTP: `python -m bench.sdk`.

Gateway, router and workers' gRPC are real; `paced_workers` stand in for engines. The clients share this process, and
the machine with the servers. All sides take turns and do equal work.
"""

from __future__ import annotations

import argparse
import asyncio
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.comparison import Comparison, Side, comparison_table, take_turns
from bench.paced_gateway import paced_gateway
from bench.paced_workers import FIRST_WORD, PACES
from bench.rig import MODEL_NAME
from bench.saving import RESULTS, save
from preft.cluster.process import raise_file_limit
from preft.core.errors import PreftError
from preft_client import AsyncClient, Client
from preft_client import PreftError as ClientError
from preft_loadgen.errors import LoadgenError

ROUNDS = 5
STREAMS, TOKENS = 64, 128  # at once, and of each
THREADS = 16  # streams of the blocking client
REQUESTS = 100  # one after the other, for the time to the first token
FAST = FIRST_WORD + 2  # a prompt's first token
BAR = 1.0


@dataclass(frozen=True, slots=True)
class Work:
    """The two clients of one transport."""

    url: str

    async def streams(self, number: int) -> float:
        """Tokens per second of STREAMS streams in one event loop."""
        async with AsyncClient(self.url, retries=0) as client:
            await asyncio.gather(*(_read(client, i, 2) for i in range(STREAMS)))  # opens the connections
            started = time.perf_counter()
            tokens = sum(await asyncio.gather(*(_read(client, i, TOKENS) for i in range(STREAMS))))
            return tokens / (time.perf_counter() - started)

    async def threads(self, number: int) -> float:
        """Tokens per second of THREADS streams of the blocking client, each in a thread."""
        return await asyncio.to_thread(self._threads)

    async def first_tokens(self, number: int) -> float:
        """1 / the median time to the first token of requests that come one after the other."""
        waits = []
        async with AsyncClient(self.url, retries=0) as client:
            for i in range(REQUESTS):
                started = time.perf_counter()
                async with client.stream((FAST, FIRST_WORD + i), model=MODEL_NAME, max_tokens=2) as stream:
                    await anext(stream)
                    waits.append(time.perf_counter() - started)
                    await stream.read()
        return 1 / statistics.median(waits)

    def _threads(self) -> float:
        with Client(self.url, retries=0) as client:
            counts: list[int] = []

            def read(number: int, tokens: int) -> None:
                answer = client.generate((FAST, FIRST_WORD + number), model=MODEL_NAME, max_tokens=tokens)
                counts.append(len(answer.token_ids))

            _run_threads([threading.Thread(target=read, args=(i, 2)) for i in range(THREADS)])
            counts.clear()
            started = time.perf_counter()
            _run_threads([threading.Thread(target=read, args=(i, TOKENS)) for i in range(THREADS)])
            if counts != [TOKENS] * THREADS:
                raise PreftError("a stream of the blocking client didn't get all its tokens")
            return sum(counts) / (time.perf_counter() - started)


async def _read(client: AsyncClient, number: int, tokens: int) -> int:
    answer = await client.generate((FAST, FIRST_WORD + number), model=MODEL_NAME, max_tokens=tokens)
    if len(answer.token_ids) != tokens:
        raise PreftError(f"a stream of {tokens} tokens has {len(answer.token_ids)}")
    return tokens


def _run_threads(threads: Sequence[threading.Thread]) -> None:
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


async def compare(http: str, grpc: str, rounds: int) -> list[Comparison]:
    """gRPC's figures as ours, HTTP's as the reference."""
    ours, reference = Work(grpc), Work(http)
    pace = PACES[FAST]
    works: list[tuple[str, str, str, list[Side[float]]]] = [
        (
            f"{STREAMS} streams, asyncio",
            "tokens/s",
            f"{STREAMS} streams of {TOKENS} tokens at once, one per {pace:g} s and stream if the machine can",
            [ours.streams, reference.streams],
        ),
        (
            f"{THREADS} streams, threads",
            "tokens/s",
            f"{THREADS} streams of {TOKENS} tokens of the blocking client",
            [ours.threads, reference.threads],
        ),
        (
            "1 / time to first token",
            "1/s",
            f"median of {REQUESTS} requests, one after the other",
            [ours.first_tokens, reference.first_tokens],
        ),
    ]
    compared = []
    for what, unit, how, sides in works:
        speeds = await take_turns(sides, rounds, lambda: None)
        compared.append(Comparison(what, unit, speeds[0], speeds[1], BAR, how))
    return compared


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 if gRPC is at least as fast as HTTP everywhere."""
    parser = argparse.ArgumentParser(prog="bench-sdk", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"default: {ROUNDS}")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    raise_file_limit()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    try:
        with (
            tempfile.TemporaryDirectory(prefix="preft-bench-") as folder,
            paced_gateway(Path(folder), STREAMS, grpc_port=port) as server,
        ):
            compared = asyncio.run(compare(server.url, f"grpc://127.0.0.1:{port}", arguments.rounds))
    except (PreftError, ClientError, LoadgenError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    print(comparison_table(compared))
    path = save(arguments.out, "sdk", "bench.sdk", argv, {"comparisons": [one.as_json() for one in compared]})
    print(f"ours: gRPC; reference: HTTP; all figures are in {path}")
    return 0 if all(one.reached for one in compared) else 1


if __name__ == "__main__":
    sys.exit(main())
