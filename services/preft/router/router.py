"""The Generator over a cluster: wires queue, policy and connections, and keeps the picture of the workers fresh.

Owns the poll of the state store and everything it starts; `close` ends it. A request's own life is in `generation`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, replace

from preft.core.cluster import AdapterPlace, ClusterSnapshot, Role, Worker, WorkerState
from preft.core.errors import PreftError
from preft.core.ports import Generation, StateStore
from preft.core.request import AdapterRef, GenerateRequest
from preft.core.settings import RouterSettings
from preft.router.admission import Admission
from preft.router.channels import WorkerChannels
from preft.router.generation import Counters, RoutedGeneration
from preft.router.ledger import Ledger
from preft.router.policy import AffinityPolicy, Policy, Roster
from preft.router.prefetch import Prefetcher
from preft.rpc.secret import ClusterSecret

logger = logging.getLogger(__name__)

WHERE_SECONDS = 2.0  # for a worker to say where it has an adapter


@dataclass(frozen=True, slots=True)
class RouterStats:
    """For metrics. `in_flight` counts prefills or sequences per worker id; `retries` and `resumes` are totals."""

    waiting: int
    in_flight: Mapping[str, int]
    retries: int
    resumes: int


class Router:
    """A Generator. `async with Router(...)`, or `start` and `close`, inside one event loop."""

    def __init__(
        self,
        store: StateStore,
        settings: RouterSettings,
        secret: ClusterSecret,
        *,
        cluster_id: str = "",
        policy: Policy | None = None,
    ) -> None:
        """Reads workers from `store`, which stays the caller's: those named `<cluster_id>-...`, or all without one.

        Calls to them carry the cluster's `secret`. `policy` is an AffinityPolicy unless given.
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
        self._snapshot = ClusterSnapshot({}, 0.0)
        self._read_at = 0.0  # time.time() of the last answer of the store
        self._lost_at: dict[str, float] = {}  # worker id -> time.time() of a broken call
        self._polling: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Reads the cluster once and keeps reading it. Raises Unavailable if the store can't be read."""
        self._registered(await self._store.workers())
        self._polling = asyncio.create_task(self._poll())

    async def close(self) -> None:
        """Turns away what waits, and ends all that was started. Running generations fail."""
        if self._polling is not None:
            self._polling.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._polling
        self._admission.close()
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
        """Whether a prefill and a decode worker that fit together take requests."""
        return self._admission.roster.serving

    @property
    def snapshot(self) -> ClusterSnapshot:
        """The cluster as the router sees it: silent or unreachable workers are DEAD in it."""
        return self._snapshot

    async def places(self, adapter: AdapterRef) -> Sequence[AdapterPlace]:
        """See `AdapterPlaces.places`."""
        workers = self._snapshot.ready(Role.PREFILL, Role.COLOCATED)
        asked = (self._channels.where(worker, adapter, WHERE_SECONDS) for worker in workers)
        answers = await asyncio.gather(*asked, return_exceptions=True)
        return [answer for answer in answers if isinstance(answer, AdapterPlace)]

    def stats(self) -> RouterStats:
        """The router's own figures at this moment."""
        return RouterStats(
            self._admission.waiting, self._ledger.in_flight(), self._counters.retries, self._counters.resumes
        )

    @asynccontextmanager
    async def _generate(self, request: GenerateRequest) -> AsyncIterator[Generation]:
        generation = RoutedGeneration(request, self._admission, self._channels, self._settings, self._counters)
        try:
            generation.start()
            yield generation
        finally:
            await generation.close()

    async def _poll(self) -> None:
        failing = False
        while True:
            await asyncio.sleep(self._settings.poll_interval)
            try:
                self._registered(await self._store.workers())
                failing = False
            except PreftError as error:
                if not failing:
                    logger.warning("routing goes on with the workers known so far: %s", error)
                failing = True
            except Exception:  # the poll must outlive any one bad answer
                logger.exception("the cluster's state couldn't be taken over")

    def _registered(self, workers: Iterable[Worker]) -> None:
        """Takes over the registry's list."""
        self._read_at = time.time()
        self._workers = {worker.id: worker for worker in workers if worker.id.startswith(self._prefix)}
        self._lost_at = {
            worker_id: lost
            for worker_id, lost in self._lost_at.items()
            if worker_id in self._workers and self._workers[worker_id].heartbeat <= lost
        }
        self._ledger.observe(self._workers.values())
        self._channels.retain({worker.address for worker in self._workers.values()})
        self._look()

    def _lost(self, worker: Worker) -> None:
        """A call to `worker` broke: nothing more goes there until it is heard of again."""
        known = worker.id in self._lost_at
        self._lost_at[worker.id] = time.time()
        if not known:
            self._look()

    def _look(self) -> None:
        now = self._read_at  # while the store can't be read, silence is the store's
        self._snapshot = ClusterSnapshot({key: self._judged(worker, now) for key, worker in self._workers.items()}, now)
        self._admission.update(Roster.of(self._snapshot))

    def _judged(self, worker: Worker, now: float) -> Worker:
        silent = now - worker.heartbeat > self._settings.worker_timeout
        if worker.state is not WorkerState.DEAD and (silent or worker.id in self._lost_at):
            return replace(worker, state=WorkerState.DEAD)
        return worker
