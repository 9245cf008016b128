"""Room that is kept for requests that have waited long: memory, and a worker's adapter slot.

This module notes for whom room is kept, on the workers themselves. The policy keeps younger requests out of that room.
"""

from __future__ import annotations

from preft.router.fits import could_hold
from preft.router.policy import Demand, Refusal
from preft.router.view import ClusterView
from preft.router.worker_view import Order, WorkerView


class KeptRoom:
    """For each kind of memory, at most one worker's memory is kept, for the oldest request that lacks it."""

    def __init__(self, view: ClusterView) -> None:
        self._view = view
        self._memory: dict[Refusal, WorkerView] = {}

    def want(self, demand: Demand, refusal: Refusal) -> None:
        """Notes one worker whose memory younger requests leave alone once `demand` has waited long."""
        if refusal is Refusal.NO_PREFILL or self._is_kept(refusal, demand.order):
            return
        if refusal is Refusal.NO_STAGING:
            able = (one for one in self._view.prompting() if demand.staging(one.worker) <= one.worker.staging_bytes)
            chosen = min(able, key=lambda one: (one.is_stalled, one.staging.taken), default=None)
        else:
            able = (one for one in self._view.decoding() if could_hold(one.worker, demand))
            chosen = min(able, key=lambda one: (one.is_stalled, self._view.fullness(one)), default=None)
        if chosen is not None:
            self.keep(refusal, chosen, demand.order)

    def keep(self, refusal: Refusal, worker: WorkerView, order: Order) -> None:
        """Keeps the worker's memory for this request, unless memory is kept for an older one."""
        if not self._is_kept(refusal, order):
            if (before := self._memory.get(refusal)) is not None:
                before.memory_for = None
            worker.memory_for = order
            self._memory[refusal] = worker

    def give_up(self, order: Order, at: WorkerView | None) -> None:
        """Gives up what was kept for a request that has waited for `at`, or for any worker (None)."""
        if at is not None and at.slot_for == order:
            at.slot_for = None
        for refusal, worker in list(self._memory.items()):
            if worker.memory_for == order:
                worker.memory_for = None
                del self._memory[refusal]

    def has(self, order: Order, at: WorkerView | None) -> bool:
        """Whether a slot of `at` or any memory is kept for this request."""
        return (at is not None and at.slot_for == order) or any(
            one.memory_for == order for one in self._memory.values()
        )

    def _is_kept(self, refusal: Refusal, order: Order) -> bool:
        """Whether memory is kept for this request, or for an older one."""
        kept = self._memory.get(refusal)
        return kept is not None and kept.is_ready and kept.memory_for is not None and kept.memory_for <= order
