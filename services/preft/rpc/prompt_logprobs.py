"""A prompt's log probabilities on the wire: in parts, so that no message is large, and checked when they are whole.

A prompt of 32,000 tokens with 20 alternatives each has 5 MB of them. `convert` owns all other values.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator

from preft.core.errors import EngineFailed
from preft.core.request import PromptLogprobs, TokenDelta
from preft.rpc import common_pb2

PART_VALUES = 16_384  # 130 KB


def prompt_parts(logprobs: PromptLogprobs) -> Iterator[common_pb2.PromptLogprobs]:
    """The values as messages of at most PART_VALUES tokens; at least one message, also without rows."""
    width = logprobs.top + 1
    rows = max(1, PART_VALUES // width)
    for start in range(0, max(1, len(logprobs)), rows):
        values = slice(start * width, (start + rows) * width)
        yield common_pb2.PromptLogprobs(
            top=logprobs.top,
            token_ids=logprobs.token_ids[values],
            logprobs=logprobs.logprobs[values],
            ranks=logprobs.ranks[start : start + rows],
        )


def part_deltas(delta: TokenDelta) -> Iterator[common_pb2.TokenDelta]:
    """The messages with the prompt's log probabilities that go before the delta's own message; often none."""
    if delta.prompt_logprobs is not None:
        for part in prompt_parts(delta.prompt_logprobs):
            yield common_pb2.TokenDelta(index=delta.index, prompt_logprobs=part)


class PromptParts:
    """Joins the parts of one prompt's log probabilities. `wanted` is the request's `prompt_logprobs`."""

    def __init__(self, wanted: int | None, prompt_tokens: int) -> None:
        self._wanted = wanted
        self._rows = prompt_tokens - 1
        self._token_ids, self._logprobs, self._ranks = array("I"), array("f"), array("I")
        self._parts = 0

    def add(self, part: common_pb2.PromptLogprobs) -> None:
        """Raises EngineFailed for a part that the request doesn't ask for, or that has other sizes."""
        rows = len(part.ranks)
        values = rows * (part.top + 1)
        if part.top != self._wanted or len(part.token_ids) != values or len(part.logprobs) != values:
            raise EngineFailed("a worker sent other log probabilities of the prompt than it was asked for")
        if len(self._ranks) + rows > self._rows:
            raise EngineFailed("a worker sent more log probabilities than the prompt has tokens")
        self._parts += 1
        self._token_ids.extend(part.token_ids)
        self._logprobs.extend(part.logprobs)
        self._ranks.extend(part.ranks)

    def whole(self) -> PromptLogprobs | None:
        """All values; None if the request asks for none. Raises EngineFailed if values are missing."""
        if self._wanted is None:
            return None
        if not self._parts or len(self._ranks) != self._rows:
            raise EngineFailed("a worker sent too few log probabilities of the prompt")
        return PromptLogprobs(self._wanted, self._token_ids, self._logprobs, self._ranks)
