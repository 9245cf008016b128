"""Whose adapter answered: greedy answers under load, compared with those of a calm pass before it.

Every request is one of a few probes. In the calm pass each model answers each probe alone. Under load an answer is
right if it equals its own model's calm one, wrong if it equals another model's, and unclear if it equals none.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from preft_loadgen.errors import InvalidArgument
from preft_loadgen.report.metrics import Checked
from preft_loadgen.traffic.prompts import Prompts
from preft_loadgen.traffic.request import Prompt, Request, Turn
from preft_loadgen.transport.reply import CANCELLED, Reply
from preft_loadgen.transport.server import Send, Server

PROBES = 2
CALM_NAME = "loadgen-calm"
Contents = Callable[[str, float, float], set[str]]
"""From a model, and the times at which a request was sent and ended: the contents that may have answered it."""


class Probes:
    """The only prompts of a load whose answers are compared. A source of prompts itself."""

    def __init__(self, prompts: Prompts, seed: int) -> None:
        source = random.Random(f"probes {seed}")
        self.all = tuple(prompts.conversation(1, source)[0] for _ in range(PROBES))

    def conversation(self, turns: int, source: random.Random) -> list[Turn]:
        return [source.choice(self.all)]


Answers = Mapping[str, Mapping[Prompt, Prompt]]
"""By content, then by prompt."""


async def calm_pass(
    server: Server, models: Sequence[str], folders: Sequence[str], probes: Probes, step: Callable[[], object]
) -> Answers:
    """Each model's answers, and those of each adapter folder, which is served for this under CALM_NAME.

    One request at a time. Calls `step` after each model. Raises RequestFailed, or InvalidArgument if all models answer
    alike.
    """
    answers: dict[str, dict[Prompt, Prompt]] = {}
    for model in models:
        answers[model] = await _ask(server.send, model, probes)
        step()
    for folder in folders:
        await server.load_adapter(CALM_NAME, folder)
        try:
            answers[folder] = await _ask(server.send, CALM_NAME, probes)
        finally:
            await server.unload_adapter(CALM_NAME)
        step()
    different = {tuple(sorted(own.items(), key=str)) for own in answers.values()}
    if len(answers) > 1 and len(different) == 1:
        raise InvalidArgument(
            "all models give equal answers to the probes: longer outputs, or other adapters, can tell them apart"
        )
    return answers


async def _ask(send: Send, model: str, probes: Probes) -> dict[Prompt, Prompt]:
    found = {}
    for probe in probes.all:
        found[probe.prompt] = _key(await send(Request(model, probe.prompt, probe.output_tokens, wants_ids=True)))
    return found


class Checker:
    """Compares the answers of one run. `contents` says what may have answered; by default the named model."""

    def __init__(self, answers: Answers, contents: Contents | None = None) -> None:
        self._answers = answers
        self._contents = contents or (lambda model, sent, ended: {model})
        self._right = self._unclear = 0
        self._wrong_by: Counter[str] = Counter()

    def sends(self, send: Send) -> Send:
        """`send`, with a look at each answer."""

        async def checked(request: Request) -> Reply:
            reply = await send(replace(request, wants_ids=True))
            if reply.finish_reason != CANCELLED:
                self._check(request, reply)
            return reply

        return checked

    def result(self) -> Checked:
        """The counts so far."""
        wrong = sum(self._wrong_by.values())
        total = self._right + wrong + self._unclear
        return Checked(total, self._right, wrong, self._unclear, dict(self._wrong_by.most_common()))

    def _check(self, request: Request, reply: Reply) -> None:
        got = _key(reply)
        owners = [content for content, own in self._answers.items() if own.get(request.prompt) == got]
        allowed = self._contents(reply.model or request.model, reply.started, reply.ended)
        if allowed & set(owners):
            self._right += 1
        elif owners:
            self._wrong_by[owners[0]] += 1
        else:
            self._unclear += 1


def _key(reply: Reply) -> Prompt:
    return reply.token_ids or reply.text
