"""One request and its attempts, as the simulated workers see them."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field

from bench.simulate.workload import Arrival
from preft.core.request import AdapterRef
from preft.router.admission import Admission
from preft.router.lease import Lease
from preft.router.view import ClusterView
from preft.router.worker_view import Order


@dataclass(frozen=True, slots=True, eq=False)
class SimRouter:
    """One router: its name, its view of the workers, and its queue."""

    name: str
    view: ClusterView
    queue: Admission


@dataclass(slots=True, eq=False)
class SimRequest:
    """Times are -1 until they happen. `tokens` counts output tokens."""

    arrival: Arrival
    router: SimRouter
    adapter: AdapterRef | None
    order: Order
    avoid: frozenset[str] = frozenset()
    begun: float = -1.0  # its prompt's computation, in the first attempt that got so far
    first_token: float = -1.0
    finished: float = -1.0
    tokens: int = 0
    attempts: int = 0

    @property
    def digest(self) -> str:
        return self.adapter.digest if self.adapter else ""


@dataclass(slots=True, eq=False)
class SimAttempt:
    """A request with a lease. `open` is False once it has ended or its worker is gone: later events are void."""

    request: SimRequest
    lease: Lease
    left: int  # prompt tokens that aren't computed
    slot: ExitStack = field(default_factory=ExitStack)  # the worker's count of it, until its prompt is computed
    open: bool = True

    @property
    def digest(self) -> str:
        return self.request.digest

    @property
    def staged(self) -> int:
        """Bytes of the prompt's KV, as long as it isn't with the decode engine."""
        return self.lease.prefill.worker.kv_bytes(self.request.arrival.prompt) if self.lease.decode else 0
