"""The Generator over a cluster: connects queue, policy and channels, and keeps the list of workers up to date.

The router owns the poll of the state store and all that it starts; `close` ends them. `generation` owns a request's
life.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, replace

from preft.core.background import Background
from preft.core.cluster import AdapterPlace, ClusterSnapshot, Role, Worker, WorkerState
from preft.core.errors import Unavailable
from preft.core.ports import Generation, StateStore
from preft.core.request import AdapterRef, GenerateRequest
from preft.core.settings import RouterSettings
from preft.router.admission import Admission
from preft.router.channels import WorkerChannels
from preft.router.generation import Counters, RoutedGeneration
from preft.router.ledger import Ledger
from preft.router.liveness import Liveness
from preft.router.policy import AffinityPolicy, Policy, Roster
from preft.router.prefetch import Prefetcher
from preft.rpc.secret import ClusterSecret

WHERE_SECONDS = 2.0  # a worker's time to say where it holds an adapter


@dataclass(frozen=True, slots=True)
class RouterStats:
    """`in_flight` counts prefills or sequences per worker id; `retries` and `resumes` are totals."""

    waiting: int
    in_flight: Mapping[str, int]
    retries: int
    resumes: int


class Router:
    """A Generator. Use `async with Router(...)`, or `start` and `close`, inside one event loop."""

    def __init__(
        self,
        store: StateStore,
        settings: RouterSettings,
        secret: ClusterSecret,
        *,
        cluster_id: str = "",
        policy: Policy | None = None,
    ) -> None:
        """Reads workers from `store`, which the caller closes: those named `<cluster_id>-...`, or all without an id.

        Calls to workers carry the cluster's `secret`. `policy` defaults to an AffinityPolicy.
        """
        self._store = store
        self._prefix = f"{cluster_id}-" if cluster_id else ""
        self._settings = settings
        self._ledger = Ledger()
        self._admission = Admission(
            policy or AffinityPolicy(settings.max_inflight_prefills),
            self._ledger,
            settings.max_queue,
            settings.restart_grace,
            lambda worker, adapter: self._prefetcher.want(worker, adapter),
        )
        self._channels = WorkerChannels(secret, self._lost)
        self._prefetcher = Prefetcher(
            self._channels, self._ledger, settings.request_timeout, self._admission.load_ended
        )
        self._counters = Counters()
        self._workers: Mapping[str, Worker] = {}  # as registered
        self._snapshot = ClusterSnapshot({})
        self._liveness = Liveness(settings.worker_timeout)
        self._generations: set[RoutedGeneration] = set()
        self._background = Background()

    async def start(self) -> None:
        """Reads the list of workers once, then every poll interval. Raises Unavailable if the first read fails."""
        await self._poll()
        self._background.every(self._settings.poll_interval, self._poll, "the router's list of workers is not read")

    async def close(self) -> None:
        """Ends running and later generations at once with Unavailable, then all calls and tasks."""
        stopping = Unavailable("the server is shutting down")
        await self._background.close()
        self._admission.close(stopping)
        for generation in list(self._generations):
            generation.fail(stopping)
        await self._prefetcher.close()
        await self._channels.close()

    async def __aenter__(self) -> Router:
        await self.start()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    def generate(self, request: GenerateRequest) -> AbstractAsyncContextManager[Generation]:
        """See `Generator.generate`."""
        return self._generate(request)

    def ready(self) -> bool:
        """Whether a prefill worker and a decode worker that fit together take requests."""
        return self._admission.roster.serving

    @property
    def snapshot(self) -> ClusterSnapshot:
        """The cluster as the router sees it: silent or unreachable workers are DEAD, unless they are still starting."""
        return self._snapshot

    async def places(self, adapter: AdapterRef) -> Sequence[AdapterPlace]:
        """See `AdapterPlaces.places`."""
        workers = self._snapshot.ready(Role.PREFILL, Role.COLOCATED)
        asked = (self._channels.where(worker, adapter, WHERE_SECONDS) for worker in workers)
        answers = await asyncio.gather(*asked, return_exceptions=True)
        return [answer for answer in answers if isinstance(answer, AdapterPlace)]

    def stats(self) -> RouterStats:
        return RouterStats(
            self._admission.waiting, self._ledger.in_flight(), self._counters.retries, self._counters.resumes
        )

    @asynccontextmanager
    async def _generate(self, request: GenerateRequest) -> AsyncIterator[Generation]:
        generation = RoutedGeneration(request, self._admission, self._channels, self._settings, self._counters)
        try:
            generation.start()
            self._generations.add(generation)
            yield generation
        finally:
            self._generations.discard(generation)
            await generation.close()

    async def _poll(self) -> None:
        """Takes over the registry's list. While the store can't be read, the last list stays."""
        asked = time.monotonic()
        workers = {worker.id: worker for worker in await self._store.workers() if worker.id.startswith(self._prefix)}
        self._workers = workers
        self._liveness.read(workers.values(), asked)
        self._ledger.observe(workers.values())
        self._channels.retain({worker.address for worker in workers.values()})
        self._look()

    def _lost(self, worker: Worker) -> None:
        """A call to `worker` broke: it gets no requests until a later heartbeat."""
        if self._liveness.lost(worker.id):
            self._look()

    def _look(self) -> None:
        dead = [
            replace(worker, state=WorkerState.DEAD)
            for worker in self._workers.values()
            if worker.state is not WorkerState.STARTING and not self._liveness.alive(worker.id)
        ]
        self._snapshot = ClusterSnapshot({**self._workers, **{worker.id: worker for worker in dead}})
        self._admission.update(Roster.of(self._snapshot))
