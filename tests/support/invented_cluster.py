"""A ClusterView without workers: registrations and status messages as a test invents them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from preft.core.cluster import (
    REGION_BYTES,
    AdapterState,
    AdapterStatus,
    Role,
    StatusUpdate,
    Worker,
    WorkerState,
    WorkerStatus,
)
from preft.router.view import ClusterView
from preft.router.worker_view import WorkerView

BLOCK_BYTES = 1000
STAGED = BLOCK_BYTES + REGION_BYTES  # a prompt of one block takes so much staging memory


@dataclass(frozen=True)
class Member:
    """A registration, and the worker's first message (None: it hasn't told anything)."""

    worker: Worker
    update: StatusUpdate | None


def a_worker(
    worker_id: str,
    role: Role,
    fingerprint: str = "f",
    blocks: int = 100,
    max_num_seqs: int = 0,
    slots: int = 0,
    staging: int = 0,
    pid: int = 1,
) -> Worker:
    """`staging` in prompts of one block; with 0 nothing goes through staging memory."""
    return Worker(
        worker_id,
        role,
        "h:1",
        f"{fingerprint} {worker_id}" if role is Role.COLOCATED else fingerprint,  # its KV moves nowhere
        pid,
        block_bytes=BLOCK_BYTES if staging else 0,
        kv_blocks=blocks,
        staging_bytes=staging * STAGED,
        max_num_seqs=max_num_seqs,
        adapter_slots=slots,
    )


def a_message(
    adapters: Iterable[str] = (),
    *,
    loading: Iterable[str] = (),
    others: Mapping[str, int] | None = None,
    whole: bool = True,
    **status: Any,
) -> StatusUpdate:
    """`adapters` are in memory; `others` are other routers' prompts by adapter; `status` are fields of WorkerStatus."""
    others = others or {}
    states: dict[str, AdapterState | None] = dict.fromkeys(others)
    states |= dict.fromkeys(loading, AdapterState.LOADING) | dict.fromkeys(adapters, AdapterState.HOST)
    known = {digest: AdapterStatus(state, others.get(digest, 0)) for digest, state in states.items()}
    return StatusUpdate(WorkerStatus(**{"staging_bytes_fit": 10**9} | status), known, is_whole=whole)


def gone(*digests: str) -> StatusUpdate:
    """The message that these adapters have left the worker's memory."""
    return StatusUpdate(WorkerStatus(staging_bytes_fit=10**9), dict.fromkeys(digests, AdapterStatus(None)))


def a_member(
    worker_id: str,
    role: Role,
    *,
    state: WorkerState = WorkerState.READY,
    adapters: Iterable[str] = (),
    used: int = 0,
    running: int = 0,
    stalled: int = 0,
    **worker: Any,
) -> Member:
    draining = state is WorkerState.DRAINING
    status = {"draining": draining, "kv_blocks_used": used, "running": running, "stalled_seconds": stalled}
    update = a_message(adapters, **status)
    tells = draining or state is WorkerState.READY
    return Member(a_worker(worker_id, role, **worker), update if tells else None)


def p(worker_id: str, **options: Any) -> Member:
    return a_member(worker_id, Role.PREFILL, **options)


def d(worker_id: str, **options: Any) -> Member:
    return a_member(worker_id, Role.DECODE, **options)


def view_of(*members: Member, max_prefills: int = 8, queued_share: float = 0.25) -> ClusterView:
    view = ClusterView(max_prefills, queued_share)
    view.register(member.worker for member in members)
    for member in members:
        if member.update is not None:
            view.workers[member.worker.id].told(member.update)
    return view


def check_indexes(view: ClusterView) -> None:
    """Compares all indexes with what the single workers' views say."""
    ready = [one for one in view.workers.values() if one.state is WorkerState.READY]
    prompting = [one for one in ready if one.worker.role is not Role.DECODE]
    decoding = [one for one in ready if one.worker.role is not Role.PREFILL]

    free = {one.id: one.load for one in prompting if one.prefills < view.max_prefills}
    assert view.prefill._level_of == free
    assert [one.load for one in view.prefill] == sorted(free.values())
    levels: dict[str, dict[str, int]] = {}
    for one in decoding:
        levels.setdefault(one.worker.fingerprint, {})[one.id] = int(64 * view.fullness(one))
    assert {fingerprint: index._level_of for fingerprint, index in view.decode.items()} == levels
    assert view.stalled == {one.id for one in ready if one.is_stalled}
    assert set(view.ring._numbers) == {one.id for one in prompting}
    assert set(view.ring._owners.tolist()) == view.ring._members.keys()
    assert {one.id for one in view.prompting()} == {one.id for one in prompting}
    fingerprints = {one.worker.fingerprint for one in prompting}
    assert {one.id for one in view.decoding()} == {one.id for one in decoding if one.worker.fingerprint in fingerprints}
    assert view.serving is any(one.worker.fingerprint in fingerprints for one in decoding)

    def lists(is_there: Any) -> dict[str, dict[str, WorkerView]]:
        places: dict[str, dict[str, WorkerView]] = {}
        for one in view.workers.values():
            if one.worker.role is Role.DECODE:
                continue
            for digest in {*one.adapters, *one.loads, *one._loaded, *one._own_prompts} - {""}:
                if is_there(one, digest):
                    places.setdefault(digest, {})[one.id] = one
        return places

    assert view.holders == lists(lambda one, digest: one.holds(digest))
    assert view.loaders == lists(lambda one, digest: one.is_loading(digest))
