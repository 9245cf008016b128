"""Part of `make bench-cluster`: the router's policy against a least-loaded one, over the same real workers.

Two routers share the workers of `cluster_rig` and take turns. They differ in their policy alone.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from bench.cluster_rig import CONCURRENCY, HOW, check, disk_loads, requests_of, write_cluster
from bench.comparison import Comparison, comparison_table, take_turns, turns
from bench.rig import served_adapters
from bench.saving import RESULTS, save
from bench.simulate.policies import LeastLoaded, fits
from preft.cluster.secret import stored_secret
from preft.core.errors import PreftError
from preft.core.request import AdapterRef, GenerateRequest, Sampling
from preft.core.settings import RouterSettings
from preft.router.policy import AffinityPolicy, Crowded, Demand, Pair, Placement, Policy
from preft.router.router import Router
from preft.router.view import ClusterView
from preft.router.worker_view import WorkerView
from preft.rpc.secret import ClusterSecret
from preft.state import open_store
from preft_loadgen.driver import closed_loop
from preft_loadgen.errors import LoadgenError
from preft_loadgen.http_stream import HttpClient, Reply
from preft_loadgen.report import progress
from preft_loadgen.served import served
from preft_loadgen.workload import Lengths, Request

OUTPUT = Lengths(2, 6)  # tokens
TOLD_SECONDS = 2.0  # for the workers' last status messages
BAR = 1.2


class LeastLoadedSlot(LeastLoaded):
    """The worker with the fewest prompts among those with a slot: workers refuse prompts without one."""

    def place(self, demand: Demand, view: ClusterView, now: float) -> Placement:
        """See `Policy.place`."""
        placed = super().place(demand, view, now)
        return Crowded(placed.prefill) if isinstance(placed, Pair) and not _has_slot(placed.prefill, demand) else placed

    def choose(self, demand: Demand, view: ClusterView, now: float) -> WorkerView | None:
        """See `Direct.choose`."""
        able = (one for one in view.prefill if fits(one, demand, view) and _has_slot(one, demand))
        return next(able, None) or super().choose(demand, view, now)


def _has_slot(worker: WorkerView, demand: Demand) -> bool:
    if not demand.digest or worker.in_slot(demand.digest):
        return True
    return worker.slots_used < worker.worker.adapter_slots and not worker.is_full


async def _measure(folder: Path, requests: int, rounds: int) -> tuple[Comparison, dict[str, Any]]:
    settings, config, model = await asyncio.to_thread(write_cluster, folder)
    log = folder / "serve.log"
    with served(["--config", str(config)], state_dir=folder / "state", log=log, ready_seconds=600) as server:
        adapters = await served_adapters(HttpClient(server.url), settings["adapters"])
        secret, own = ClusterSecret(stored_secret(server.state_dir)), RouterSettings()
        store = open_store(server.state_dir / "state.sqlite")
        async with AsyncExitStack() as stack:
            stack.push_async_callback(store.close)
            loads: dict[str, list[int]] = {}

            async def side(name: str, policy: Policy) -> Callable[[int], Awaitable[float]]:
                router = await stack.enter_async_context(Router(store, own, secret, policy=policy))
                return partial(_speed, router, adapters, requests, loads.setdefault(name, []))

            sides = [
                await side("ours", AffinityPolicy(patience=own.patience)),
                await side("least-loaded", LeastLoadedSlot()),
            ]
            with progress("routing", turns(len(sides), rounds)) as bar:
                ours, reference = await take_turns(sides, rounds, bar.update)
    how = (
        f"prompt tokens per second from the first request to the end of the last; {HOW}, 32-96 prompt and "
        f"{OUTPUT.low}-{OUTPUT.high} output tokens; reference: each request goes at once to the prefill worker with "
        f"the fewest prompts and a free slot, which loads the adapter; loads from disk per round: {loads}"
    )
    return Comparison("prefill tokens/s, by policy", "tokens/s", ours, reference, BAR, how), model


async def _speed(router: Router, adapters: Sequence[AdapterRef], requests: int, loads: list[int], number: int) -> float:
    """Prompt tokens per second of one run."""
    by_name = {adapter.name: adapter for adapter in adapters}
    made = requests_of(by_name, requests, OUTPUT, number)
    before = _disk_loads(router)
    run = await closed_loop(partial(_send, router, by_name, count()), made, CONCURRENCY)
    check(run)
    await asyncio.sleep(TOLD_SECONDS)
    if number >= 0:
        loads.append(_disk_loads(router) - before)
    return sum(len(request.prompt) for request in made) / run.seconds


async def _send(router: Router, adapters: dict[str, AdapterRef], numbers: count[int], request: Request) -> Reply:
    """One request through the router. An error of the cluster is the load generator's."""
    sampling = Sampling(max_tokens=request.output_tokens, temperature=0.0, ignore_eos=True)
    asked = GenerateRequest(f"bench-{next(numbers)}", request.prompt, sampling, adapters[request.model])
    started = time.perf_counter()
    arrivals: list[float] = []
    tokens = 0
    try:
        async with router.generate(asked) as generation:
            async for delta in generation:
                arrivals.append(time.perf_counter())
                tokens += len(delta.token_ids)
    except PreftError as error:
        raise LoadgenError(str(error)) from error
    return Reply(started, time.perf_counter(), tuple(arrivals), tokens, "", "length")


def _disk_loads(router: Router) -> int:
    return disk_loads(asdict(seen.status.tiers) for seen in router.workers())


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 if everything was measured; 1 if a measurement failed."""
    parser = argparse.ArgumentParser(prog="bench-routing", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--requests", type=int, default=256, help="per round and policy (default: 256)")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    started = time.monotonic()
    try:
        with tempfile.TemporaryDirectory(prefix="preft-bench-") as folder:
            comparison, model = asyncio.run(_measure(Path(folder), arguments.requests, arguments.rounds))
    except (PreftError, LoadgenError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    print(comparison_table([comparison]))
    figures = {"model": model, "comparisons": [comparison.as_json()]}
    path = save(arguments.out, "routing", "bench.routing", argv, figures)
    print(f"{comparison.how}\n{time.monotonic() - started:.0f} s; all figures are in {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
