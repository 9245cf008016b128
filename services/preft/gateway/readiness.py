"""Explains in words why the gateway isn't ready: the missing workers, and the stage of each."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

from preft.core.cluster import Role, Worker, WorkerState


def missing_workers(workers: Iterable[Worker], roles: Sequence[Role]) -> str:
    """One sentence per role of `roles` without a ready worker. Without such a role, the ready workers don't match."""
    known = list(workers)
    sentences = []
    for role in roles:
        own = [worker for worker in known if worker.role is role]
        if not any(worker.state is WorkerState.READY for worker in own):
            stages = ", ".join(f"{worker.id} {_stage(worker)}" for worker in own)
            sentences.append(f"no {role.value} worker is ready: {stages or 'none has registered yet'}")
    return "; ".join(sentences) or "the workers that are ready don't fit together"


def _stage(worker: Worker) -> str:
    if worker.state is WorkerState.STARTING:
        return f"has been loading its engine for {max(0.0, time.time() - worker.heartbeat):.0f} s"
    return f"is {worker.state.value}"


def worker_json(worker: Worker) -> dict[str, str]:
    """A worker as /ready lists it."""
    return {"id": worker.id, "role": worker.role.value, "state": worker.state.value}
