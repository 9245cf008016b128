"""One simulated prefill worker: computes prompts in steps, as vLLM does with chunked prefill."""

from __future__ import annotations

import math
from asyncio import AbstractEventLoop
from collections import OrderedDict
from collections.abc import Callable

from bench.simulate.attempt import SimAttempt
from bench.simulate.memory import AdapterMemory
from bench.simulate.scenario import Engine
from preft.core.cluster import AdapterStatus, StatusUpdate, WorkerStatus
from preft.worker.usage import Usage


class PrefillWorker:
    """A step takes prompts in order of arrival, until its tokens or its slots are used up."""

    def __init__(
        self, engine: Engine, slots: int, loop: AbstractEventLoop, on_prompt: Callable[[SimAttempt], None]
    ) -> None:
        """`on_prompt` gets each attempt whose prompt has just been computed.

        The worker refuses prompts of more than `slots` adapters; those of more than the engine has wait for a slot.
        """
        self.memory = AdapterMemory(engine, loop)
        self.usage = Usage(slots)
        self.usage.observe(self.memory.changed)
        self.waits: dict[str, float] = {}  # since when a request of each router has waited for a slot
        self.staging_used = 0
        self.busy = 0.0  # seconds of steps
        self.steps = 0  # with an adapter
        self.step_adapters = 0  # in those steps, in total
        self.prompts: list[SimAttempt] = []
        self._engine = engine
        self._loop = loop
        self._on_prompt = on_prompt
        self._slots: OrderedDict[str, None] = OrderedDict()
        self._stepping = False
        self._gone = False

    def submit(self, attempt: SimAttempt) -> None:
        """Takes a prompt. A worker without the adapter loads it first. Raises WorkerFull."""
        request, digest = attempt.request, attempt.digest
        attempt.slot.enter_context(self.usage.prompt(request.router.name, digest, request.arrival.prompt))
        self.staging_used += attempt.staged
        self.prompts.append(attempt)
        if digest:
            self.memory.use(digest)
            if digest not in self.memory:
                self.memory.load(digest, self._step)
        self._step()

    def status(self, router: str, *, whole: bool = False) -> StatusUpdate:
        """What to tell this router."""
        fit = self._engine.staging_bytes - self.staging_used
        prompts, tokens = self.usage.other_work(router)
        since = min((one for name, one in self.waits.items() if name != router), default=math.inf)
        status = WorkerStatus(
            running=len(self.prompts),
            staging_bytes_used=self.staging_used,
            staging_bytes_fit=max(0, fit),
            other_prompts=prompts,
            other_prompt_tokens=tokens,
            other_slot_wait_ms=int(1000 * max(0.0, self._loop.time() - since)),
        )
        adapters = {
            digest: AdapterStatus(self.memory.state(digest), self.usage.other_prompts(router, digest))
            for digest in self.memory.changes(router, whole=whole)
        }
        return StatusUpdate(status, adapters, whole)

    def close(self) -> list[SimAttempt]:
        """The worker is gone. Returns the attempts that it had."""
        self._gone = True
        self.memory.close()
        return self.prompts

    def _step(self) -> None:
        if self._stepping or self._gone:
            return
        budget, engine = self._engine.step_tokens, self._engine
        work: list[tuple[SimAttempt, int]] = []
        adapters: set[str] = set()
        for attempt in self.prompts:
            digest = attempt.digest
            if digest and digest not in adapters:
                if digest not in self.memory or len(adapters) >= engine.slots:
                    continue
                adapters.add(digest)
            tokens = min(budget, attempt.left)
            work.append((attempt, tokens))
            budget -= tokens
            if not budget:
                break
        if not work:
            return
        if adapters:
            self.steps += 1
            self.step_adapters += len(adapters)
        now = self._loop.time()
        for attempt, _ in work:
            if attempt.request.begun < 0:
                attempt.request.begun = now
        seconds = engine.step_seconds + (engine.step_tokens - budget) * engine.token_seconds
        seconds += len(adapters) * engine.adapter_seconds
        seconds += self._enter_slots(adapters) * engine.adapter_bytes / engine.slot_rate
        self.busy += seconds
        self._stepping = True
        self._loop.call_later(seconds, self._end, work)

    def _end(self, work: list[tuple[SimAttempt, int]]) -> None:
        if self._gone:
            return
        self._stepping = False
        for attempt, tokens in work:
            attempt.left -= tokens
            if not attempt.left:
                self.prompts.remove(attempt)
                attempt.slot.close()
                if attempt.digest:
                    self.memory.leave(attempt.digest)
                self._on_prompt(attempt)
        self._step()

    def _enter_slots(self, adapters: set[str]) -> int:
        """Counts the adapters that weren't in a slot. The least recently used adapters leave."""
        new = 0
        for digest in sorted(adapters):
            new += digest not in self._slots
            self._slots[digest] = None
            self._slots.move_to_end(digest)
        while len(self._slots) > self._engine.slots:
            self._slots.popitem(last=False)
        return new
