"""One run of one policy: requests arrive, wait in the production queue, and go through the simulated workers.

This module owns a request's life, as `generation`, `attempt` and `lease` have it in the router, and the times at which
figures begin and end to count.
"""

from __future__ import annotations

import asyncio
import gc
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import cycle

from bench.simulate.attempt import SimAttempt, SimRequest, SimRouter
from bench.simulate.clock import Stopwatch, VirtualLoop
from bench.simulate.cluster import Cluster, worker_id
from bench.simulate.figures import Run, Totals
from bench.simulate.policies import POLICIES
from bench.simulate.scenario import Loss, Scenario
from bench.simulate.timed import TimedAdmission, TimedPolicy
from bench.simulate.workload import Arrival, Workload, adapter_refs
from preft.core.cluster import Role
from preft.core.errors import QueueFull, WorkerFull
from preft.core.request import AdapterRef
from preft.router.generation import KV_ALLOWANCE
from preft.router.policy import Absent, Crowded, Demand, Pair
from preft.router.router import QUEUED_SHARE
from preft.router.ticket import Ticket
from preft.router.view import ClusterView
from preft.router.worker_view import WorkerView

MAX_PREFILLS = 64  # the default of `router.max_inflight_prefills`
OURS = "ours"  # the policy that sends a worker no more adapters than it has slots
DRAIN_SECONDS = 600.0  # for the requests that are left after the last arrival


def simulate(scenario: Scenario, policy: str, patience: float) -> Run:
    """Runs the whole scenario, and the requests that are left after it."""
    began = time.perf_counter()
    loop = VirtualLoop()
    try:
        simulation = _Simulation(scenario, policy, patience, loop)
        gc.collect()
        gc.disable()  # a collection would count as a turn of the router, though most objects are the simulator's
        run = loop.run_until_complete(simulation.go())
    finally:
        gc.enable()
        loop.close()
    run.seconds = time.perf_counter() - began
    return run


class _Simulation:
    def __init__(self, scenario: Scenario, policy: str, patience: float, loop: VirtualLoop) -> None:
        self._scenario = scenario
        self._loop = loop
        self._workload = Workload(scenario)
        self._arrivals = self._workload.arrivals()
        self._refs = adapter_refs(scenario.adapters)
        self._watch = Stopwatch()
        self._policy = TimedPolicy(POLICIES[policy](patience))
        slots = scenario.engine.slots if policy == OURS else sys.maxsize
        self._cluster = Cluster(scenario, slots, loop, self._watch, self._prompted, self._finished)
        self._cluster.routers = [self._router(f"router-{number}") for number in range(scenario.routers)]
        self._turns = cycle(self._cluster.routers)
        self._attempts: dict[SimAttempt, None] = {}
        self._running = 0  # requests that aren't finished
        self._run = Run(scenario, policy, patience)

    async def go(self) -> Run:
        scenario = self._scenario
        self._cluster.start()
        self._cluster.fill(self._first_places())
        for loss in scenario.losses:
            self._loop.call_at(loss.start, self._lose, loss)
        self._loop.call_at(scenario.warmup, self._measure)
        self._loop.call_at(scenario.end, self._measured)
        for _ in range(scenario.clients or 1):
            self._next()
        await asyncio.sleep(scenario.end)
        limit = scenario.end + DRAIN_SECONDS
        while self._running and self._loop.time() < limit:
            await asyncio.sleep(1.0)
        self._run.unfinished = self._running
        for router in self._cluster.routers:
            self._run.in_flight |= {(router.name, key): number for key, number in router.view.in_flight().items()}
        return self._run

    def _router(self, name: str) -> SimRouter:
        view = ClusterView(MAX_PREFILLS, QUEUED_SHARE)

        def prefetch(worker: WorkerView, adapter: AdapterRef) -> None:
            self._cluster.prefetch(router, worker, adapter)

        queue = TimedAdmission(self._policy, view, self._scenario.max_queue, prefetch, self._watch)
        router = SimRouter(name, view, queue)
        return router

    def _first_places(self) -> Iterator[tuple[WorkerView, AdapterRef]]:
        """Where the policy places the adapters that fit, one by one in the idle cluster, the most popular ones last."""
        room = self._scenario.engine.host_adapters * self._scenario.prefill
        view = self._cluster.routers[0].view
        for number in reversed(self._workload.by_rank[:room]):
            adapter = self._refs[number]
            placed = self._policy.place(Demand(adapter.digest, 100, 200, 50, adapter=adapter), view, 0.0)
            if isinstance(placed, Pair):
                yield placed.prefill, adapter
            elif isinstance(placed, Absent | Crowded):
                yield placed.worker, adapter

    # Requests

    def _next(self) -> None:
        arrival = next(self._arrivals, None)
        if arrival is None:
            return
        if self._scenario.clients:
            arrival = replace(arrival, at=self._loop.time())
        if arrival.at < self._scenario.end:
            self._loop.call_at(arrival.at, self._arrive, arrival)

    def _arrive(self, arrival: Arrival) -> None:
        if not self._scenario.clients:
            self._next()
        router = next(self._turns)
        with self._watch:
            order = router.queue.shares.order(arrival.at, "", 0, arrival.prompt + arrival.output)
        request = SimRequest(arrival, router, self._refs[arrival.adapter] if arrival.adapter >= 0 else None, order)
        if arrival.at >= self._scenario.warmup:
            self._run.requests.append(request)
        self._running += 1
        self._enter(request)

    def _enter(self, request: SimRequest) -> None:
        arrival = request.arrival
        demand = Demand(
            digest=request.digest,
            kv_tokens=arrival.prompt + min(arrival.output, request.tokens + KV_ALLOWANCE),
            max_tokens=arrival.prompt + arrival.output,
            prompt_tokens=arrival.prompt,
            decodes=arrival.output > 1,
            adapter=request.adapter,
            order=request.order,
            avoid=request.avoid,
        )
        try:
            ticket = request.router.queue.enter(demand, [0], started=request.attempts > 0)
        except QueueFull:
            self._run.refused += 1
            self._running -= 1
            return
        request.attempts += 1
        ticket.outcome.add_done_callback(lambda _: self._leased(request, ticket))

    def _leased(self, request: SimRequest, ticket: Ticket) -> None:
        lease = ticket.outcome.result()
        attempt = SimAttempt(request, lease, request.arrival.prompt)
        self._attempts[attempt] = None
        self._cluster.later(self._prefill, attempt)

    def _prefill(self, attempt: SimAttempt) -> None:
        node = self._cluster.prefill.get(attempt.lease.prefill.id)
        if node is None:
            self._fail(attempt, attempt.lease.prefill.id)
        elif attempt.open:
            try:
                node.submit(attempt)
            except WorkerFull:
                self._cluster.later(self._full, attempt)

    def _full(self, attempt: SimAttempt) -> None:
        """Prompts of another router have the slots: the request enters the queue again."""
        if attempt.open:
            self._run.full += 1
            self._end(attempt)
            attempt.lease.prefill.is_full = True
            self._enter(attempt.request)

    def _prompted(self, attempt: SimAttempt) -> None:
        """The prompt is computed: the first token goes to the client, and the KV to the decode worker."""
        self._cluster.later(self._first_token, attempt)
        engine, request = self._scenario.engine, attempt.request
        if attempt.lease.decode is not None:
            seconds = request.arrival.prompt * engine.kv_token_bytes / engine.kv_rate
            self._loop.call_later(seconds, self._pushed, attempt)

    def _first_token(self, attempt: SimAttempt) -> None:
        if not attempt.open:
            return
        request = attempt.request
        with self._watch:
            attempt.lease.prefill.succeeded()
            attempt.lease.prompt_ended()
        if request.first_token < 0:
            request.first_token = self._loop.time()
            request.tokens = 1
        if attempt.lease.decode is None:
            self._finished(attempt)

    def _pushed(self, attempt: SimAttempt) -> None:
        prefill = self._cluster.prefill.get(attempt.lease.prefill.id)
        if prefill is not None:
            prefill.staging_used -= attempt.staged
        if not attempt.open or attempt.lease.decode is None:
            return
        with self._watch:
            attempt.lease.prefill_ended()
        decode = self._cluster.decode.get(attempt.lease.decode.id)
        if decode is None:
            self._fail(attempt, attempt.lease.decode.id)
        else:
            decode.submit(attempt)

    def _finished(self, attempt: SimAttempt) -> None:
        if not attempt.open:
            return
        self._end(attempt)
        attempt.request.finished = self._loop.time()
        self._run.finished += 1
        self._running -= 1
        if self._scenario.clients:
            self._next()

    def _fail(self, attempt: SimAttempt, at: str) -> None:
        """A worker of the attempt is gone: the request enters the queue again, with its old place."""
        if attempt.open:
            self._end(attempt)
            attempt.request.avoid |= {at}
            self._run.retried += 1
            self._enter(attempt.request)

    def _end(self, attempt: SimAttempt) -> None:
        attempt.open = False
        del self._attempts[attempt]
        with self._watch:
            attempt.lease.release()

    # Events

    def _lose(self, loss: Loss) -> None:
        lost = worker_id(Role.DECODE if loss.decode else Role.PREFILL, loss.worker)
        self._cluster.lose(lost)
        for attempt in list(self._attempts):
            if lost in (attempt.lease.prefill.id, attempt.lease.decode.id if attempt.lease.decode else ""):
                self._fail(attempt, lost)
        self._loop.call_later(loss.seconds, self._cluster.restart, lost)

    def _measure(self) -> None:
        """Figures count from now on."""
        self._watch.forget()
        self._policy.watch.forget()
        self._run.before = Totals.of(self._cluster)

    def _measured(self) -> None:
        """Figures end to count, except those of requests that are still under way."""
        self._run.after = Totals.of(self._cluster)
        self._run.turns = self._watch.times[:]
        self._run.decisions = self._policy.watch.times[:]
