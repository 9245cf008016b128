"""The simulated workers of one run, and what the router's view hears of them: registrations, status, loss, loads."""

from __future__ import annotations

from asyncio import AbstractEventLoop
from collections.abc import Callable, Iterable
from dataclasses import replace

from bench.simulate.attempt import SimAttempt
from bench.simulate.clock import Stopwatch
from bench.simulate.decode import DecodeWorker
from bench.simulate.prefill import PrefillWorker
from bench.simulate.scenario import Scenario
from preft.core.cluster import Role, Worker
from preft.core.request import AdapterRef
from preft.router.admission import Admission
from preft.router.view import ClusterView
from preft.router.watches import INTERVALS, MESSAGES
from preft.router.worker_view import WorkerView

SIGN_OF_LIFE = 1.0  # seconds after which a worker tells again what hasn't changed
Node = PrefillWorker | DecodeWorker


class Cluster:
    """Owns the workers. The router's turns are measured by `watch`."""

    def __init__(
        self,
        scenario: Scenario,
        loop: AbstractEventLoop,
        view: ClusterView,
        watch: Stopwatch,
        on_prompt: Callable[[SimAttempt], None],
        on_end: Callable[[SimAttempt], None],
    ) -> None:
        self.prefill: dict[str, PrefillWorker] = {}
        self.decode: dict[str, DecodeWorker] = {}
        self.gone: list[PrefillWorker] = []
        self.queue: Admission | None = None  # set before `start`
        self._scenario = scenario
        self._loop = loop
        self._view = view
        self._watch = watch
        self._on_prompt = on_prompt
        self._on_end = on_end
        number = scenario.prefill + scenario.decode
        self._interval = min(INTERVALS[1], max(INTERVALS[0], number / MESSAGES))
        self._registered: dict[str, Worker] = {}

    def start(self) -> None:
        """Registers all workers. Their status messages spread over the interval."""
        for role, number in ((Role.PREFILL, self._scenario.prefill), (Role.DECODE, self._scenario.decode)):
            for index in range(number):
                worker = self._registration(role, worker_id(role, index))
                self._registered[worker.id] = worker
        self._view.register(self._registered.values())
        for place, view in enumerate(self._view.workers.values()):
            self._begin(view, self._interval * place / len(self._registered))

    def lose(self, lost: str) -> None:
        """The worker's process ends: its calls break, and the router hears it at once."""
        view = self._view.workers[lost]
        prefill = self.prefill.pop(lost, None)
        decode = self.decode.pop(lost, None)
        if prefill is not None:
            prefill.close()
            self.gone.append(prefill)
        if decode is not None:
            decode.close()
        with self._watch:
            view.lost(self._loop.time())
            self._admission.workers_changed()
            for digest in list(view.loads):
                view.load_ended(digest, self._loop.time(), done=False)
                self._admission.load_ended(view, digest, None)

    def restart(self, lost: str) -> None:
        """The worker is back, with another process and empty memory."""
        before = self._registered[lost]
        self._registered[lost] = replace(before, pid=before.pid + 1)
        with self._watch:
            self._view.register(self._registered.values())
        self._begin(self._view.workers[lost], 0.0)
        with self._watch:
            self._admission.workers_changed()

    def prefetch(self, view: WorkerView, adapter: AdapterRef) -> None:
        """Loads the adapter at the worker, as the router's Prefetcher asks for it."""
        node = self.prefill.get(view.id)
        if node is None or adapter.digest in view.loads:
            return
        view.load_begins(adapter.digest)
        self.later(node.memory.load, adapter.digest, lambda: self.later(self._loaded, view, adapter.digest))

    def later(self, do: Callable[..., object], *arguments: object) -> None:
        """Does something when a message has gone over the network."""
        self._loop.call_later(self._scenario.engine.rpc_seconds, do, *arguments)

    def fill(self, placed: Iterable[tuple[WorkerView, AdapterRef]]) -> None:
        """Puts adapters into the memory of workers before the run."""
        for view, adapter in placed:
            node = self.prefill[view.id]
            node.memory.fill(adapter.digest)
            view.told(node.status())

    @property
    def _admission(self) -> Admission:
        if self.queue is None:
            raise RuntimeError("the cluster has no queue")
        return self.queue

    def _registration(self, role: Role, name: str) -> Worker:
        engine = self._scenario.engine
        return Worker(
            id=name,
            role=role,
            address=name,
            fingerprint="model",
            block_size=engine.block_size,
            block_bytes=engine.block_size * engine.kv_token_bytes,
            kv_blocks=engine.kv_tokens // engine.block_size,
            staging_bytes=engine.staging_bytes,
            max_num_seqs=engine.decode_batch,
            adapter_slots=engine.slots if role is Role.PREFILL else 0,
        )

    def _begin(self, view: WorkerView, delay: float) -> None:
        node: Node
        if view.worker.role is Role.PREFILL:
            node = self.prefill[view.id] = PrefillWorker(self._scenario.engine, self._loop, self._on_prompt)
        else:
            node = self.decode[view.id] = DecodeWorker(self._scenario.engine, self._loop, self._on_end)
        with self._watch:
            view.told(node.status(whole=True))
        self._loop.call_later(self._interval + delay, self._tell, view, node)

    def _tell(self, view: WorkerView, node: Node) -> None:
        if (self.prefill.get(view.id) or self.decode.get(view.id)) is not node:
            return
        update, now = node.status(), self._loop.time()
        if update.adapters or update.status != view.status or now >= view.heard + SIGN_OF_LIFE:
            view.heard = now
            with self._watch:
                view.told(update)
                self._admission.wake(view)
        self._loop.call_later(self._interval, self._tell, view, node)

    def _loaded(self, view: WorkerView, digest: str) -> None:
        if digest in view.loads:
            with self._watch:
                view.load_ended(digest, self._loop.time(), done=True)
                self._admission.load_ended(view, digest, None)


def worker_id(role: Role, index: int) -> str:
    return f"{role}-{index}"
