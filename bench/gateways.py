"""Part of `make bench-cluster`: two gateways over the same workers, against one. Needs `redis-server`.

The gateways and the workers of `cluster_rig` meet in Redis. Each request goes to the next gateway in turn, or all go to
the first. Answers of both sides must be equal, and no worker may have more adapters in slots than it has slots.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Sequence
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

from bench.cluster_rig import CONCURRENCY, HOW, SLOTS, check, disk_loads, requests_of, write_cluster
from bench.command import bench_folder
from bench.comparison import Comparison, comparison_table, take_turns, turns
from bench.redis_server import running_redis
from bench.saving import RESULTS, save
from preft.core.errors import PreftError
from preft_loadgen.measure.driver import closed_loop
from preft_loadgen.report.progress import progress
from preft_loadgen.served import served
from preft_loadgen.traffic.lengths import Lengths
from preft_loadgen.traffic.request import Request
from preft_loadgen.transport.http import HttpClient
from preft_loadgen.transport.reply import Reply
from preft_loadgen.transport.server import completions

OUTPUT = Lengths(8, 24)  # tokens
LOOK_SECONDS = 0.2
TOLD_SECONDS = 2.0  # for the workers' last status messages
SPEED_BAR, LOADS_BAR = 0.95, 1 / 1.1


class Watch:
    """What the gateways say of the workers' slots: the most adapters in the slots of a worker."""

    def __init__(self, clients: Sequence[HttpClient]) -> None:
        self._clients = clients
        self.most = 0

    async def look(self) -> None:
        """Looks until it is cancelled."""
        for client in cycle(self._clients):
            self.most = max(self.most, *(one["slots_used"] for one in await _tiers(client)))
            await asyncio.sleep(LOOK_SECONDS)


async def _tiers(client: HttpClient) -> list[dict[str, Any]]:
    workers = (await client.get_json("/v1/workers"))["workers"]
    return [worker["status"]["tiers"] for worker in workers]


async def _measure(folder: Path, requests: int, rounds: int) -> tuple[list[Comparison], dict[str, Any]]:
    settings, config, model = await asyncio.to_thread(write_cluster, folder)
    command = (sys.executable, "-m", "preft.cli", "gateway")
    with (
        running_redis(folder / "redis") as redis,
        served(
            ["--config", str(config), "--state", redis.url],
            state_dir=folder / "state",
            log=folder / "serve.log",
            ready_seconds=600,
        ) as first,
        served(
            ["--config", str(config), "--state", redis.url],
            state_dir=folder / "state",
            log=folder / "gateway.log",
            command=command,
        ) as second,
    ):
        clients = [HttpClient(server.url) for server in (first, second)]
        watch, loads = Watch(clients), ([], [])  # type: tuple[Watch, tuple[list[int], list[int]]]
        answers: tuple[dict[Any, str], dict[Any, str]] = ({}, {})
        looking = asyncio.create_task(watch.look())
        names = tuple(settings["adapters"])

        async def speed(side: int, number: int) -> float:
            turn = cycle(completions(client) for client in clients[: 2 - side])

            async def send(request: Request) -> Reply:
                reply = await next(turn)(request)
                answers[side][request.model, request.prompt, request.output_tokens] = reply.text
                return reply

            before = disk_loads(await _tiers(clients[0]))
            run = await closed_loop(send, requests_of(names, requests, OUTPUT, number), CONCURRENCY)
            check(run)
            await asyncio.sleep(TOLD_SECONDS)
            if number >= 0:
                loads[side].append(disk_loads(await _tiers(clients[0])) - before)
            return sum(record.tokens for record in run.records) / run.seconds

        with progress("gateways", turns(2, rounds)) as bar:
            two, one = await take_turns([partial(speed, 0), partial(speed, 1)], rounds, bar.update)
        looking.cancel()
        if (await asyncio.gather(looking, return_exceptions=True))[0].__class__ is not asyncio.CancelledError:
            raise PreftError("the workers' slots could not be watched")
    wrong = sum(answers[0][key] != answers[1][key] for key in answers[0])
    checks = {"answers": len(answers[0]), "wrong": wrong, "slots": SLOTS, "most adapters in slots": watch.most}
    how = f"{HOW}, {OUTPUT.low}-{OUTPUT.high} output tokens; state in Redis; reference: one gateway"
    inverse = [tuple(1 / max(1, number) for number in side) for side in loads]
    return [
        Comparison("tokens/s, two gateways", "tokens/s", two, one, SPEED_BAR, how),
        Comparison("1 / adapter loads, two gateways", "", inverse[0], inverse[1], LOADS_BAR, f"{how}; loads: {loads}"),
    ], {"model": model, "checks": checks}


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 if everything was measured and all answers were right; 1 otherwise."""
    parser = argparse.ArgumentParser(prog="bench-gateways", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--requests", type=int, default=480, help="per round and side (default: 480)")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    started = time.monotonic()
    with bench_folder() as folder:
        comparisons, facts = asyncio.run(_measure(folder, arguments.requests, arguments.rounds))
    print(comparison_table(comparisons))
    checks = facts["checks"]
    print(", ".join(f"{name}: {value}" for name, value in checks.items()))
    figures = {**facts, "comparisons": [one.as_json() for one in comparisons]}
    path = save(arguments.out, "gateways", "bench.gateways", argv, figures)
    print(f"{comparisons[1].how}\n{time.monotonic() - started:.0f} s; all figures are in {path}")
    return 1 if checks["wrong"] or checks["most adapters in slots"] > SLOTS else 0


if __name__ == "__main__":
    sys.exit(main())
