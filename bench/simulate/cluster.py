"""The simulated workers of one run, and what the routers hear of them: registrations, status, loss, loads."""

from __future__ import annotations

import math
from asyncio import AbstractEventLoop
from collections.abc import Callable, Iterable
from dataclasses import replace

from bench.simulate.attempt import SimAttempt, SimRouter
from bench.simulate.clock import Stopwatch
from bench.simulate.decode import DecodeWorker
from bench.simulate.prefill import PrefillWorker
from bench.simulate.scenario import Scenario
from preft.core.cluster import Role, Worker
from preft.core.request import AdapterRef
from preft.router.watches import INTERVALS, MESSAGES
from preft.router.worker_view import WorkerView
from preft.worker.status import SOON

SIGN_OF_LIFE = 1.0  # seconds after which a worker tells again what hasn't changed
Node = PrefillWorker | DecodeWorker


class Cluster:
    """Owns the workers. The routers' turns are measured by `watch`."""

    def __init__(
        self,
        scenario: Scenario,
        slots: int,
        loop: AbstractEventLoop,
        watch: Stopwatch,
        on_prompt: Callable[[SimAttempt], None],
        on_end: Callable[[SimAttempt], None],
    ) -> None:
        """Prefill workers refuse prompts of more than `slots` adapters at once."""
        self.prefill: dict[str, PrefillWorker] = {}
        self.decode: dict[str, DecodeWorker] = {}
        self.gone: list[PrefillWorker] = []
        self.routers: list[SimRouter] = []  # set before `start`
        self._scenario = scenario
        self._slots = slots
        self._loop = loop
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
        self._register()
        for place, worker in enumerate(self._registered.values()):
            self._begin(worker, self._interval * place / len(self._registered))

    def lose(self, lost: str) -> None:
        """The worker's process ends: its calls break, and the routers hear it at once."""
        prefill = self.prefill.pop(lost, None)
        decode = self.decode.pop(lost, None)
        if prefill is not None:
            prefill.close()
            self.gone.append(prefill)
        if decode is not None:
            decode.close()
        with self._watch:
            for router in self.routers:
                view = router.view.workers[lost]
                view.lost(self._loop.time())
                router.queue.workers_changed()
                for digest in list(view.loads):
                    view.load_ended(digest, self._loop.time(), done=False)
                    router.queue.load_ended(view, digest, None)

    def restart(self, lost: str) -> None:
        """The worker is back, with another process and empty memory."""
        before = self._registered[lost]
        self._registered[lost] = replace(before, pid=before.pid + 1)
        self._register()
        self._begin(self._registered[lost], 0.0)
        with self._watch:
            for router in self.routers:
                router.queue.workers_changed()

    def prefetch(self, router: SimRouter, view: WorkerView, adapter: AdapterRef) -> None:
        """Loads the adapter at the worker, as a router's Prefetcher asks for it."""
        node = self.prefill.get(view.id)
        if node is None or adapter.digest in view.loads:
            return
        view.load_begins(adapter.digest)
        self.later(node.memory.load, adapter.digest, lambda: self.later(self._loaded, router, view, adapter.digest))

    def later(self, do: Callable[..., object], *arguments: object) -> None:
        """Does something when a message has gone over the network."""
        self._loop.call_later(self._scenario.engine.rpc_seconds, do, *arguments)

    def fill(self, placed: Iterable[tuple[WorkerView, AdapterRef]]) -> None:
        """Puts adapters into the memory of workers before the run."""
        for view, adapter in placed:
            node = self.prefill[view.id]
            node.memory.fill(adapter.digest)
            for router in self.routers:
                router.view.workers[view.id].told(node.status(router.name))

    def _register(self) -> None:
        with self._watch:
            for router in self.routers:
                router.view.register(self._registered.values())

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

    def _begin(self, worker: Worker, delay: float) -> None:
        engine = self._scenario.engine
        node: Node
        if worker.role is Role.PREFILL:
            node = self.prefill[worker.id] = PrefillWorker(engine, self._slots, self._loop, self._on_prompt)
        else:
            node = self.decode[worker.id] = DecodeWorker(engine, self._loop, self._on_end)
        for place, router in enumerate(self.routers):
            view = router.view.workers[worker.id]
            with self._watch:
                view.told(node.status(router.name, whole=True))
            wait = self._interval * (1 + place / len(self.routers)) + delay
            self._loop.call_later(wait, self._tell, router, view, node)
            if isinstance(node, PrefillWorker):
                self._loop.call_later(delay, self._tell_news, router, view, node)

    def _tell_news(self, router: SimRouter, view: WorkerView, node: PrefillWorker) -> None:
        """What changed of adapters comes sooner than the rest."""
        if self.prefill.get(view.id) is not node:
            return
        if node.memory.has_news(router.name):
            with self._watch:
                view.told(node.status(router.name), self._loop.time())
                router.queue.wake(view)
        self._loop.call_later(SOON * self._interval, self._tell_news, router, view, node)

    def _tell(self, router: SimRouter, view: WorkerView, node: Node) -> None:
        if (self.prefill.get(view.id) or self.decode.get(view.id)) is not node:
            return
        update, now = node.status(router.name), self._loop.time()
        if isinstance(node, PrefillWorker) and view.wants_changed.is_set():
            view.wants_changed.clear()
            node.memory.wanted[router.name] = frozenset(view.wanted)
            node.waits[router.name] = view.slot_for[0] if view.slot_for else math.inf
        if update.adapters or update.status != view.status or now >= view.heard + SIGN_OF_LIFE:
            with self._watch:
                view.told(update, now)
                router.queue.wake(view)
        self._loop.call_later(self._interval, self._tell, router, view, node)

    def _loaded(self, router: SimRouter, view: WorkerView, digest: str) -> None:
        if digest in view.loads:
            with self._watch:
                view.load_ended(digest, self._loop.time(), done=True)
                router.queue.load_ended(view, digest, None)


def worker_id(role: Role, index: int) -> str:
    return f"{role}-{index}"
