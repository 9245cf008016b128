"""One load at several adapter counts against one server."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

from preft_loadgen.errors import InvalidArgument, RequestFailed
from preft_loadgen.measure.churn import Change, Churn
from preft_loadgen.measure.driver import closed_loop, open_loop
from preft_loadgen.measure.record import Run
from preft_loadgen.measure.verify import Answers, Checker, Probes, calm_pass
from preft_loadgen.report.metrics import Summary, summarize
from preft_loadgen.report.progress import Live, progress
from preft_loadgen.report.slo import Slo
from preft_loadgen.traffic.arrivals import OpenLoop
from preft_loadgen.traffic.choice import Choice, Uniform
from preft_loadgen.traffic.lengths import Length, Lengths
from preft_loadgen.traffic.prompts import Ids, Material, Prompts, RandomPrompts
from preft_loadgen.traffic.request import Request
from preft_loadgen.traffic.trace import Row, replay
from preft_loadgen.traffic.workload import ONE, Workload
from preft_loadgen.transport.server import Models, Server

WARM_UP = Lengths(2, 2)  # tokens in and out
WARM_UP_CONCURRENCY = 16


@dataclass(frozen=True, slots=True)
class ClosedLoop:
    """`concurrency` conversations at once."""

    concurrency: int = 16

    def __post_init__(self) -> None:
        if not 1 <= self.concurrency <= 1_000_000:
            raise InvalidArgument(f"the concurrency is a whole number from 1 up, not {self.concurrency}")


@dataclass(frozen=True, slots=True)
class Replay:
    """The requests of a trace, at its times."""

    rows: tuple[Row, ...]


Pace = ClosedLoop | OpenLoop | Replay
"""When requests are sent."""


@dataclass(frozen=True, slots=True)
class Churning:
    """Adapters change every `seconds`, to the content of `folders`."""

    seconds: float
    folders: tuple[str, ...]

    def __post_init__(self) -> None:
        if not 0 < self.seconds < float("inf"):
            raise InvalidArgument(f"the time between changes must be more than 0 seconds, not {self.seconds:g}")


@dataclass(frozen=True, slots=True)
class Load:
    """What is sent at each adapter count. See Workload for the first fields.

    With `warm_up` each model is asked once before a run. With `verify` all prompts are probes; see `verify`.
    """

    requests: int
    prompts: Prompts
    pace: Pace = ClosedLoop()
    choice: Choice = field(default_factory=Uniform)
    turns: Length = ONE
    cancel: float = 0.0
    exact: bool = True
    material: Material = field(default_factory=Ids)  # of warm-up and trace prompts
    warm_up: bool = True
    verify: bool = False
    churn: Churning | None = None
    slo: Slo | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.verify and (isinstance(self.pace, Replay) or self.turns != ONE):
            raise InvalidArgument("answers can't be verified in a trace or in conversations of several turns")


@dataclass(frozen=True, slots=True)
class Measured:
    """One run and its figures."""

    summary: Summary
    run: Run
    changes: tuple[Change, ...] = ()


@dataclass(frozen=True, slots=True)
class Population:
    """The models of one server: its base model, and its adapters in the order in which they join a sweep."""

    base: str | None
    adapters: tuple[str, ...]

    def models(self, count: int) -> tuple[str, ...]:
        """The first `count` adapters, or the base model for 0. Raises InvalidArgument."""
        if count > len(self.adapters):
            raise InvalidArgument(f"{count} adapters were asked for, the server has {len(self.adapters)}")
        if not count and self.base is None:
            raise InvalidArgument("the server doesn't name its base model: name it with --model")
        return self.adapters[:count] if count else (self.base or "",)


async def population(server: Server, adapters: Sequence[str] = (), base: str | None = None) -> Population:
    """The named models; what isn't named comes from the server. Raises RequestFailed.

    A server that lists no models is enough for named adapters.
    """
    if base is not None and adapters:
        return Population(base, tuple(adapters))
    try:
        served = await server.models()
    except RequestFailed as error:
        if not adapters or error.status is None:
            raise
        served = Models(None, ())
    return Population(base or served.base, tuple(adapters) or served.adapters)


async def run_sweep(
    server: Server,
    load: Load,
    counts: Sequence[int],
    models: Population,
    *,
    target: str = "",
    force_progress: bool = False,
) -> list[Measured]:
    """One measurement per adapter count (0: the base model), in order.

    Raises InvalidArgument if the server has too few adapters, RequestFailed if it doesn't answer before the load.
    """
    models.models(max(counts))
    answers = await calm_answers(server, load, counts, models, force_progress=force_progress)
    return [
        await measure(server, load, count, models, number, answers, target=target, force_progress=force_progress)
        for number, count in enumerate(counts)
    ]


async def calm_answers(
    server: Server, load: Load, counts: Sequence[int], models: Population, *, force_progress: bool = False
) -> Answers | None:
    """The calm pass over all models of a sweep, if its answers are verified."""
    if not load.verify:
        return None
    asked = list(models.models(max(counts)))
    if models.base is not None and models.base not in asked:
        asked.append(models.base)
    folders = load.churn.folders if load.churn else ()
    with progress("calm pass", len(asked) + len(folders), force=force_progress) as bar:
        return await calm_pass(server, asked, folders, Probes(load.prompts, load.seed), bar.update)


async def measure(
    server: Server,
    load: Load,
    count: int,
    models: Population,
    number: int,
    answers: Answers | None = None,
    *,
    target: str = "",
    force_progress: bool = False,
    label: str = "",
    round: int = 0,
) -> Measured:
    """One run. Runs with different `number` have different prompts: none is in a cache."""
    names = models.models(count)
    if load.warm_up:
        await _warm_up(server, load, names)
    requests, times = _requests(load, names, number)
    churn = None
    if load.churn is not None and count:
        churn = Churn(server, names, load.churn.folders, load.churn.seconds)
    checker = Checker(answers, churn.contents if churn else None) if answers is not None else None
    send = churn.sends(server.send) if churn else server.send
    send = checker.sends(send) if checker else send
    async with churn.running() if churn else nullcontext():
        total = sum(1 + len(request.later) for request in requests)
        title = f"{target + ' ' if target else ''}{described(count):11} {label}".rstrip()
        with progress(title, total, force=force_progress) as bar:
            if times is None:
                assert isinstance(load.pace, ClosedLoop)
                run = await closed_loop(send, requests, load.pace.concurrency, Live(bar))
            else:
                run = await open_loop(send, requests, times, Live(bar))
    checked = checker.result() if checker else None
    summary = summarize(run, count, slo=load.slo, checked=checked, target=target, load=label, round=round)
    return Measured(summary, run, tuple(churn.changes) if churn else ())


def described(count: int) -> str:
    """An adapter count in words."""
    return f"{count} adapter{'' if count == 1 else 's'}" if count else "base model"


async def _warm_up(server: Server, load: Load, names: Sequence[str]) -> None:
    """Asks each model once, so that all adapters that fit are loaded. Failures show in the run itself."""
    prompts = RandomPrompts(WARM_UP, WARM_UP, load.material)
    requests = Workload(tuple(names), len(names), prompts, exact=load.exact, seed=load.seed).make()
    await closed_loop(server.send, requests, min(len(names), WARM_UP_CONCURRENCY))


def _requests(load: Load, names: Sequence[str], number: int) -> tuple[list[Request], list[float] | None]:
    """The first requests of all conversations, and their times; None in a closed loop."""
    seed = load.seed * 1000 + number
    if isinstance(load.pace, Replay):
        return replay(load.pace.rows, names, load.choice, load.material, exact=load.exact, seed=seed)
    requests = Workload(
        tuple(names),
        load.requests,
        Probes(load.prompts, load.seed) if load.verify else load.prompts,
        load.choice,
        load.turns,
        load.cancel,
        load.exact,
        seed=seed,
    ).make()
    times = load.pace.times(len(requests), load.seed) if isinstance(load.pace, OpenLoop) else None
    return requests, times
