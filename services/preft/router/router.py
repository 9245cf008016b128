"""The Generator over a cluster: connects view, queue and channels, and keeps the view up to date.

The router reads the registrations of workers from the state store, and each worker's state from the worker itself. It
owns all that it starts; `close` ends them. `generation` owns a request's life.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from preft.core.background import Background
from preft.core.cluster import AdapterPlace, Role, RouterStats, Worker, WorkerSeen
from preft.core.errors import Unavailable
from preft.core.ports import Generation, StateStore
from preft.core.request import GenerateRequest
from preft.core.settings import RouterSettings
from preft.router.admission import Admission
from preft.router.channels import WorkerChannels
from preft.router.fair_share import FairShare
from preft.router.generation import Counters, RoutedGeneration
from preft.router.policy import AffinityPolicy, Policy
from preft.router.prefetch import Prefetcher
from preft.router.view import ClusterView
from preft.router.watches import Watches
from preft.router.worker_view import WorkerView
from preft.rpc.secret import ClusterSecret

FIRST_SECONDS = 2.0  # for all workers to tell their state, at the router's start
QUEUED_SHARE = 0.25  # sequences sent to a decode worker beyond its batch, which keep the batch full


class Router:
    """A Generator. Use `async with Router(...)`, or `start` and `close`, inside one event loop."""

    def __init__(
        self,
        store: StateStore,
        settings: RouterSettings,
        secret: ClusterSecret,
        *,
        cluster_id: str = "",
        content_address: str = "",
        policy: Policy | None = None,
    ) -> None:
        """Reads workers from `store`, which the caller closes: those named `<cluster_id>-...`, or all without an id.

        Calls to workers carry the cluster's `secret`, and tell of the AdapterContent service at `content_address`.
        `policy` defaults to an AffinityPolicy.
        """
        self._store = store
        self._prefix = f"{cluster_id}-" if cluster_id else ""
        self._settings = settings
        self.view = ClusterView(settings.max_inflight_prefills, QUEUED_SHARE)
        self._admission = Admission(
            policy or AffinityPolicy(patience=settings.patience),
            self.view,
            settings.max_queue,
            settings.restart_grace,
            FairShare(settings.shares),
            lambda worker, adapter: self._prefetcher.want(worker, adapter),
        )
        self.name = uuid.uuid4().hex  # under which the workers know this router
        self._channels = WorkerChannels(secret, self.name, self._lost, content_address=content_address)
        self._watches = Watches(self._channels, self.view, settings.worker_timeout, self._heard)
        self._prefetcher = Prefetcher(self._channels, settings.request_timeout, self._admission.load_ended)
        self._counters = Counters()
        self._generations: set[RoutedGeneration] = set()
        self._background = Background()

    async def start(self) -> None:
        """Reads the registrations and the workers' states once, then whenever they change.

        Raises Unavailable if the first read fails.
        """
        await self._read()
        await self._watches.settled(FIRST_SECONDS)
        self._background.every(0, self._follow, "the registrations of workers are not read")

    async def close(self) -> None:
        """Ends running and later generations at once with Unavailable, then all calls and tasks."""
        stopping = Unavailable("the server is shutting down")
        await self._background.close()
        self._admission.close(stopping)
        for generation in list(self._generations):
            generation.fail(stopping)
        await self._watches.close()
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
        return self.view.serving and not self._admission.closed

    def places(self, digest: str) -> list[AdapterPlace]:
        """The ready workers that have the adapter in memory or load it, by id."""
        ready = self.view.ready(Role.PREFILL, Role.COLOCATED)
        there = ((view, view.adapters.get(digest)) for view in ready)
        return [AdapterPlace(view.id, state, view.prompts_of(digest)) for view, state in there if state is not None]

    def workers(self) -> list[WorkerSeen]:
        """All registered workers, by id."""
        now = asyncio.get_running_loop().time()
        return [self.view.workers[key].seen(now) for key in sorted(self.view.workers)]

    def stats(self) -> RouterStats:
        """What waits and runs now, and what has happened since the start."""
        counters = self._counters
        return RouterStats(
            self._admission.waiting,
            self.view.in_flight(),
            counters.retries,
            counters.resumes,
            self._admission.refused,
            self.longest_wait(),
            self._admission.leases,
            self._admission.waited,
        )

    def longest_wait(self) -> float:
        """Seconds that the oldest request has waited for a worker."""
        came = self._admission.oldest()
        return asyncio.get_running_loop().time() - came if came is not None else 0.0

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

    async def _follow(self) -> None:
        await self._store.wait_changed(self._settings.poll_interval)
        await self._read()

    async def _read(self) -> None:
        """Takes over the registry's list. While the store can't be read, the last list stays.

        A worker that ends tells so before it leaves the list: the list of an emptied store lacks ready workers.
        """
        workers = [worker for worker in await self._store.workers() if worker.id.startswith(self._prefix)]
        listed = {worker.id for worker in workers}
        workers += [view.worker for key, view in self.view.workers.items() if view.is_ready and key not in listed]
        self.view.register(workers, asyncio.get_running_loop().time())
        self._channels.retain({worker.address for worker in workers})
        self._watches.follow()
        self._admission.workers_changed()

    def _heard(self, worker: WorkerView, came_or_went: bool) -> None:
        if came_or_went:
            self._admission.workers_changed()
        else:
            self._admission.wake(worker)

    def _lost(self, worker: Worker) -> None:
        """A call to `worker` broke: it gets no requests until it tells again that it is there."""
        self._watches.lost(worker)
