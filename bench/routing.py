"""Part of `make bench-cluster`: the router against the choice of the least loaded worker, over the same real workers.

Both share the workers of `cluster_rig` and take turns.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from bench.cluster_rig import CONCURRENCY, HOW, check, disk_loads, requests_of, write_cluster
from bench.command import bench_folder
from bench.comparison import Comparison, comparison_table, take_turns, turns
from bench.rig import served_adapters
from bench.saving import RESULTS, save
from preft.cluster.secret import stored_secret
from preft.core.cluster import Role, Worker
from preft.core.errors import PreftError
from preft.core.ports import Generation
from preft.core.request import AdapterRef, GenerateRequest, Sampling
from preft.core.settings import RouterSettings
from preft.router.router import Router
from preft.rpc.secret import ClusterSecret
from preft.state import open_store
from preft_loadgen.errors import LoadgenError
from preft_loadgen.measure.driver import closed_loop
from preft_loadgen.report.progress import progress
from preft_loadgen.served import served
from preft_loadgen.traffic.lengths import Lengths
from preft_loadgen.traffic.request import Request
from preft_loadgen.transport.http import HttpClient
from preft_loadgen.transport.reply import Reply

OUTPUT = Lengths(2, 2)  # tokens: one from each worker
TOLD_SECONDS = 2.0  # for the workers' last status messages
BAR = 1.2


class LeastLoaded:
    """Sends each request at once to the prefill worker with the fewest requests; a router of its own serves each one.

    So a worker's requests are batched by adapter as well as in the measured cluster; only their choice differs.
    """

    def __init__(self, routers: Sequence[Router]) -> None:
        self._running = dict.fromkeys(routers, 0)

    @asynccontextmanager
    async def generate(self, request: GenerateRequest) -> AsyncIterator[Generation]:
        """See `Generator.generate`."""
        router = min(self._running, key=lambda one: self._running[one])
        self._running[router] += 1
        try:
            async with router.generate(request) as generation:
                yield generation
        finally:
            self._running[router] -= 1


async def _measure(folder: Path, requests: int, rounds: int) -> tuple[Comparison, dict[str, Any]]:
    settings, config, model = await asyncio.to_thread(write_cluster, folder)
    log = folder / "serve.log"
    with served(["--config", str(config)], state_dir=folder / "state", log=log, ready_seconds=600) as server:
        adapters = await served_adapters(HttpClient(server.url), settings["adapters"])
        async with AsyncExitStack() as stack:
            store = open_store(server.state_dir / "state.sqlite")
            stack.push_async_callback(store.close)
            workers = await store.workers()
            decode = [worker for worker in workers if worker.role is Role.DECODE]
            secret = ClusterSecret(stored_secret(server.state_dir))

            async def router(name: str, *prefill: Worker) -> Router:
                own = open_store(folder / f"{name}.sqlite")
                stack.push_async_callback(own.close)
                for worker in (*prefill, *decode):
                    await own.put_worker(worker, lifetime=3600.0)
                return await stack.enter_async_context(Router(own, RouterSettings(), secret))

            prefill = [worker for worker in workers if worker.role is Role.PREFILL]
            one = await router("all", *prefill)
            each = [await router(worker.id, worker) for worker in prefill]
            loads: dict[str, list[int]] = {"ours": [], "least-loaded": []}
            sides = [
                partial(_speed, side, lambda: _disk_loads(one), adapters, requests, loads[name])
                for name, side in (("ours", one), ("least-loaded", LeastLoaded(each)))
            ]
            with progress("routing", turns(len(sides), rounds)) as bar:
                ours, reference = await take_turns(sides, rounds, bar.update)
    how = (
        f"prompt tokens per second from the first request to the end of the last; {HOW}, 8-32 prompt and "
        f"{OUTPUT.high} output tokens; reference: each request goes at once to the prefill worker with "
        f"the fewest requests, where it waits for a slot; loads from disk per round: {loads}"
    )
    return Comparison("prefill tokens/s, by policy", "tokens/s", ours, reference, BAR, how), model


async def _speed(
    side: Router | LeastLoaded,
    told_loads: Callable[[], int],
    adapters: Sequence[AdapterRef],
    requests: int,
    loads: list[int],
    number: int,
) -> float:
    """Prompt tokens per second of one run."""
    by_name = {adapter.name: adapter for adapter in adapters}
    made = requests_of(by_name, requests, OUTPUT, number)
    before = told_loads()
    run = await closed_loop(partial(_send, side, by_name, count()), made, CONCURRENCY)
    check(run)
    await asyncio.sleep(TOLD_SECONDS)
    if number >= 0:
        loads.append(told_loads() - before)
    return sum(len(request.prompt) for request in made) / run.seconds


async def _send(
    side: Router | LeastLoaded, adapters: dict[str, AdapterRef], numbers: count[int], request: Request
) -> Reply:
    """One request. An error of the cluster is the load generator's."""
    sampling = Sampling(max_tokens=request.output_tokens, temperature=0.0, ignore_eos=True)
    asked = GenerateRequest(f"bench-{next(numbers)}", request.ids, sampling, adapters[request.model])
    started = time.perf_counter()
    arrivals: list[float] = []
    tokens = 0
    try:
        async with side.generate(asked) as generation:
            async for delta in generation:
                arrivals.append(time.perf_counter())
                tokens += len(delta.token_ids)
    except PreftError as error:
        raise LoadgenError(str(error)) from error
    return Reply(started, time.perf_counter(), tuple(arrivals), tokens, "", "length")


def _disk_loads(router: Router) -> int:
    return disk_loads(asdict(seen.status.tiers) for seen in router.workers())


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 if everything was measured; a measurement that fails ends the process."""
    parser = argparse.ArgumentParser(prog="bench-routing", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--requests", type=int, default=256, help="per round and policy (default: 256)")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    started = time.monotonic()
    with bench_folder() as folder:
        comparison, model = asyncio.run(_measure(folder, arguments.requests, arguments.rounds))
    print(comparison_table([comparison]))
    figures = {"model": model, "comparisons": [comparison.as_json()]}
    path = save(arguments.out, "routing", "bench.routing", argv, figures)
    print(f"{comparison.how}\n{time.monotonic() - started:.0f} s; all figures are in {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
