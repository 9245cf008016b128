"""The production queue and any policy, with their real time measured. Their behaviour is unchanged."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from bench.simulate.clock import Stopwatch
from preft.core.request import AdapterRef
from preft.router.admission import Admission
from preft.router.fair_share import FairShare
from preft.router.policy import Demand, Placement, Policy
from preft.router.ticket import Ticket
from preft.router.view import ClusterView
from preft.router.worker_view import WorkerView


class TimedPolicy:
    """Measures each decision of `policy`."""

    def __init__(self, policy: Policy) -> None:
        self.watch = Stopwatch()
        self._policy = policy

    def place(self, demand: Demand, view: ClusterView, now: float) -> Placement:
        with self.watch:
            return self._policy.place(demand, view, now)

    def home(self, demand: Demand, view: ClusterView, now: float) -> WorkerView | None:
        with self.watch:
            return self._policy.home(demand, view, now)


class TimedAdmission(Admission):
    """Measures each of its turns on the event loop. `watch` also measures its callers' other turns."""

    def __init__(
        self,
        policy: Policy,
        view: ClusterView,
        max_queue: int,
        prefetch: Callable[[WorkerView, AdapterRef], None],
        watch: Stopwatch,
    ) -> None:
        super().__init__(policy, view, max_queue, restart_grace=600.0, shares=FairShare({}), prefetch=prefetch)
        self._watch = watch

    def enter(self, demand: Demand, choices: Sequence[int], *, started: bool = False) -> Ticket:
        with self._watch:
            return super().enter(demand, choices, started=started)

    def _pump(self) -> None:
        with self._watch:
            super()._pump()
