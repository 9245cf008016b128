"""Explains in words why the gateway isn't ready: the missing workers, and the stage of each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from preft.core.cluster import Role, WorkerSeen, WorkerState


def missing_workers(workers: Iterable[WorkerSeen], roles: Sequence[Role]) -> str:
    """One sentence per role of `roles` without a ready worker. Without such a role, the ready workers don't match."""
    known = list(workers)
    sentences = []
    for role in roles:
        own = [seen for seen in known if seen.worker.role is role]
        if not any(seen.state is WorkerState.READY for seen in own):
            stages = ", ".join(f"{seen.worker.id} {_stage(seen)}" for seen in own)
            sentences.append(f"no {role.value} worker is ready: {stages or 'none has registered yet'}")
    return "; ".join(sentences) or "the workers that are ready don't fit together"


def _stage(seen: WorkerSeen) -> str:
    if seen.state is WorkerState.STARTING:
        return f"has been loading its engine for {seen.seconds:.0f} s"
    return f"is {seen.state.value}"


def worker_json(seen: WorkerSeen) -> dict[str, str]:
    return {"id": seen.worker.id, "role": seen.worker.role.value, "state": seen.state.value}
