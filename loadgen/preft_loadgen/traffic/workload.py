"""Workloads: requests over models, equal for equal seeds."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace

from preft_loadgen.errors import InvalidArgument
from preft_loadgen.traffic.choice import Choice, Uniform
from preft_loadgen.traffic.lengths import Length, Lengths
from preft_loadgen.traffic.prompts import Prompts
from preft_loadgen.traffic.request import Request

ONE = Lengths(1, 1)


@dataclass(frozen=True, slots=True)
class Workload:
    """`requests` conversations of `turns` requests each; with the default of one turn, simply requests.

    `cancel` is the share (0 to 1) of conversations whose client hangs up in the middle of the first answer. `exact` and
    `wants_ids`: see Request.
    """

    models: tuple[str, ...]
    requests: int
    prompts: Prompts
    choice: Choice = field(default_factory=Uniform)
    turns: Length = ONE
    cancel: float = 0.0
    exact: bool = True
    wants_ids: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.models or self.requests < 1:
            raise InvalidArgument("a workload needs a model and a request")
        if not 0 <= self.cancel <= 1:
            raise InvalidArgument(f"the share of cancelled requests is from 0 to 1, not {self.cancel:g}")

    def make(self) -> list[Request]:
        """The first request of each conversation, in sending order."""
        source = random.Random(f"requests {self.seed}")
        return [self._request(model, source) for model in self.choice.draw(self.models, self.requests, source)]

    def _request(self, model: str, source: random.Random) -> Request:
        first, *later = self.prompts.conversation(self.turns.draw(source), source)
        wants_ids = self.wants_ids or (bool(later) and not isinstance(first.prompt, str))  # for the next turn's prompt
        request = Request(model, first.prompt, first.output_tokens, self.exact, later=tuple(later), wants_ids=wants_ids)
        if self.cancel and source.random() < self.cancel:
            after = source.randint(1, max(1, first.output_tokens - 1))
            return replace(request, cancel_after=after, later=(), wants_ids=self.wants_ids)
        return request
