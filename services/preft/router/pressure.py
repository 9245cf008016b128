"""How full the workers of a role are: what autoscaling goes by. Pure functions of the view of the cluster.

A pressure of 1 means that no more fits; requests that wait longer than an operator wants raise it further.
"""

from __future__ import annotations

from collections.abc import Sequence

from preft.core.cluster import Role
from preft.router.view import ClusterView
from preft.router.worker_view import WorkerView

MOST = 2.0  # by which a long queue may at most double the workers in one step


def prefill_pressure(view: ClusterView, queued: float) -> float:
    """The highest of: adapter slots in use, prompts at the workers, and `queued`, the queue's wait over its limit.

    0 without a ready worker. Slots and prompts of other routers count; the queues of other routers aren't known.
    """
    workers = view.ready(Role.PREFILL, Role.COLOCATED)
    slots = _share(workers, [one.slots_used for one in workers], [one.worker.adapter_slots for one in workers])
    others = [one.status.other_prompts if one.status else 0 for one in workers]
    prompts = [one.prefills + other for one, other in zip(workers, others, strict=True)]
    running = _share(workers, prompts, [view.max_prefills] * len(workers))
    return max(slots, running, min(queued, MOST)) if workers else 0.0


def decode_pressure(view: ClusterView) -> float:
    """The higher of: KV blocks in use, and sequences in the batches, on the mean of all ready workers."""
    workers = view.ready(Role.DECODE, Role.COLOCATED)
    blocks = _share(workers, [one.blocks.taken for one in workers], [one.worker.kv_blocks for one in workers])
    others = [one.status.other_sequences if one.status else 0 for one in workers]
    sequences = [one.sequences + other for one, other in zip(workers, others, strict=True)]
    return max(blocks, _share(workers, sequences, [one.worker.max_num_seqs for one in workers]))


def least_used(workers: Sequence[WorkerView], role: Role) -> WorkerView:
    """Of ready workers of a role, the one whose end costs least: with the fewest prompts, or the fewest KV blocks."""
    if role is Role.DECODE:
        return min(workers, key=lambda one: (one.sequences, one.blocks.taken, one.id))
    return min(workers, key=lambda one: (one.load, len(one.adapters), one.id))


def _share(workers: Sequence[WorkerView], used: Sequence[int], room: Sequence[int]) -> float:
    return sum(used) / sum(room) if workers and sum(room) else 0.0
