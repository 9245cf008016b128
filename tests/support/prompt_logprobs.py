"""Made-up log probabilities of a prompt's tokens: they depend on adapter and prompt, so that mixed-up ones show."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from zlib import crc32

from preft.core.request import PromptLogprobs


def made_up(prompt: Sequence[int], top: int, digest: str = "") -> PromptLogprobs:
    """The token itself is the second most likely: its predecessor by id comes before it, and others after it."""
    token_ids, logprobs = array("I"), array("f")
    state = crc32(b"%d" % prompt[0], crc32(digest.encode()))
    for token in prompt[1:]:
        state = crc32(b"%d" % token, state)
        likely = -(state % 64) / 8
        likeliest = [token - 1 if token else token + 1, token, *(token + 2 + rank for rank in range(top))][:top]
        token_ids.extend([token, *likeliest])
        logprobs.extend([likely - 1, *(likely - rank for rank in range(top))])
    return PromptLogprobs(top, token_ids, logprobs, array("I", [2] * (len(prompt) - 1)))
