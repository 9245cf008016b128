"""The demo: serves the example model with three adapters per user, asks every user's questions, measures tokens/s.

    python examples/demo.py

Exit status 0 only if every adapter knows at least 95% of its user's facts and no answer contains another user's fact.
"""

from __future__ import annotations

import asyncio
import random
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from personal_memory import task
from preft_loadgen.errors import LoadgenError
from preft_loadgen.measure.sweep import ClosedLoop, Load, population, run_sweep
from preft_loadgen.report.progress import progress
from preft_loadgen.report.tables import summary_table
from preft_loadgen.served import served
from preft_loadgen.table import table
from preft_loadgen.traffic.lengths import Lengths
from preft_loadgen.traffic.prompts import RandomPrompts
from preft_loadgen.transport.http import HttpClient
from preft_loadgen.transport.server import HttpServer, served_models

FOLDER = Path(__file__).parent / "personal_memory"
CONCURRENCY = 32
MAX_TOKENS = 24
GOAL = 0.95
KINDS = ("", "-loreft", "-direft")  # ends of the adapters' names; a LoRA has its user's name alone
ADAPTER_COUNTS = (1, 2, 4, 8)
REQUESTS, PROMPT, OUTPUT, AT_ONCE = 96, 24, 48, 16  # of the measurement; lengths in tokens


@dataclass(frozen=True, slots=True)
class Question:
    """A question of `user` to `model`, an own adapter or the base model. `is_fact`: the adapter should know it."""

    model: str
    user: str
    text: str
    expected: str
    is_fact: bool


@dataclass(frozen=True, slots=True)
class Score:
    """One model's answers: facts asked, facts right, and, among all `answers`, those with another user's fact."""

    model: str
    facts: int
    right: int
    answers: int
    strangers: int
    example: str

    @property
    def share(self) -> float:
        return self.right / self.facts


def owner(adapter: str) -> str:
    """The adapter's user."""
    return adapter.partition("-")[0]


def questions(base: str, adapters: Sequence[str]) -> list[Question]:
    """Every fact of every user in every phrasing, unknown topics, and all facts again for the base model.

    Each adapter gets all questions of its user, in an order that mixes users and models.
    """
    own = {user: [adapter for adapter in adapters if owner(adapter) == user] for user in task.USERS}
    asked = []
    for probe in task.probes():
        for model in (*own[probe.user], base):
            asked.append(Question(model, probe.user, probe.question, probe.expected, is_fact=True))
    for user, facts in task.USERS.items():
        for topic in sorted(set(task.TOPICS) - set(facts)):
            for phrasing in task.QUESTIONS:
                text, expected = phrasing.format(topic=topic), task.answer(topic, None)
                asked += [Question(model, user, text, expected, is_fact=False) for model in own[user]]
    random.Random(0).shuffle(asked)
    return asked


async def ask_all(client: HttpClient, asked: Sequence[Question]) -> list[str]:
    """The answers, in the questions' order. Raises RequestFailed."""
    room = asyncio.Semaphore(CONCURRENCY)

    async def ask(question: Question) -> str:
        body = {
            "model": question.model,
            "messages": [{"role": "user", "content": question.text}],
            "temperature": 0,
            "max_tokens": MAX_TOKENS,
        }
        async with room:
            reply = await client.stream("/v1/chat/completions", body)
        bar.update()
        return reply.text.strip()

    with progress("asking", len(asked)) as bar:
        return await asyncio.gather(*map(ask, asked))


def score(model: str, pairs: Iterable[tuple[Question, str]]) -> Score:
    """Judges the answers of `model` alone. A right answer equals the expected sentence exactly."""
    own = [(question, answer) for question, answer in pairs if question.model == model]
    facts = [(question, answer) for question, answer in own if question.is_fact]
    return Score(
        model=model,
        facts=len(facts),
        right=sum(answer == question.expected for question, answer in facts),
        answers=len(own),
        strangers=sum(bool(task.owners(answer) - {question.user}) for question, answer in own),
        example=f"{facts[0][0].text} {facts[0][1]}",
    )


def verdict(scores: Sequence[Score], adapters: int) -> str | None:
    """The first failure of the answers, in one sentence; None if there is none."""
    if strangers := [one for one in scores if one.strangers]:
        names = ", ".join(one.model for one in strangers)
        return f"{sum(one.strangers for one in strangers)} answers to {names} tell another user's fact"
    if weak := [one for one in scores if one.share < GOAL]:
        names = ", ".join(f"{one.model} ({one.share:.0%})" for one in weak)
        return f"less than {GOAL:.0%} of the facts are right for {names}"
    if len(scores) < adapters:
        return f"only {len(scores)} of {adapters} adapters were asked"
    return None


def score_table(scores: Sequence[Score], base: Score) -> str:
    rows = [
        (one.model, f"{one.right}/{one.facts}", f"{one.share:.1%}", str(one.strangers), one.example) for one in scores
    ]
    rows.append(("no adapter", f"{base.right}/{base.facts}", f"{base.share:.1%}", "-", base.example))
    return table([("adapter", "facts right", "", "others' facts", "for example"), *rows], right={1, 2, 3})


async def run(url: str, adapters: Sequence[str]) -> str | None:
    """Asks and measures the server at `url`; returns `verdict`. Raises LoadgenError."""
    client = HttpClient(url, timeout=300.0)
    base, _ = await served_models(client)
    asked = questions(base, adapters)
    print(f"asking {len(asked)} questions, {CONCURRENCY} at a time: every user's adapters and the base model, mixed")
    started = time.monotonic()
    pairs = list(zip(asked, await ask_all(client, asked), strict=True))
    scores = [score(adapter, pairs) for adapter in adapters]
    print(f"\n{score_table(scores, score(base, pairs))}")
    print(
        f"\n{sum(one.answers for one in scores)} answers under adapters in {time.monotonic() - started:.0f} s,"
        f" {sum(one.strangers for one in scores)} of them with another user's fact\n"
    )
    counts = [count for count in ADAPTER_COUNTS if count <= len(adapters)]
    load = Load(REQUESTS, RandomPrompts(Lengths(PROMPT, PROMPT), Lengths(OUTPUT, OUTPUT)), ClosedLoop(AT_ONCE))
    server = HttpServer(client)
    summaries = [one.summary for one in await run_sweep(server, load, counts, await population(server))]
    print(f"{REQUESTS} requests, {AT_ONCE} at a time, {PROMPT} prompt", end=" ")
    print(f"and {OUTPUT} output tokens:\n\n{summary_table(summaries)}\n")
    if failed := [summary.first_error for summary in summaries if summary.first_error is not None]:
        return f"requests failed, the first with: {failed[0]}"
    return verdict(scores, len(task.USERS) * len(KINDS))


def main() -> int:
    folders = [FOLDER / "adapters" / f"{user}{kind}" for user in task.USERS for kind in KINDS]
    adapters = {folder.name: folder for folder in folders if folder.is_dir()}
    arguments = ["--model", str(FOLDER / "model"), *(f"--adapter={name}={path}" for name, path in adapters.items())]
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="preft-demo-") as folder:
        print(f"starting a cluster with {len(adapters)} adapters (a minute or so)", flush=True)
        try:
            with served(arguments, state_dir=Path(folder) / "state", log=Path(folder) / "serve.log") as server:
                print(f"ready after {server.start_seconds:.0f} s on {server.url}", flush=True)
                problem = asyncio.run(run(server.url, list(adapters)))
        except LoadgenError as error:
            problem = str(error)
        except KeyboardInterrupt:
            return 130
    if problem is not None:
        print(f"demo: {problem}", file=sys.stderr)
        return 1
    print(f"the cluster has ended and left nothing running; {time.monotonic() - started:.0f} s in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
