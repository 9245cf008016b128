"""Requests that ask for their prompt: its log probabilities go before all output, and its output may be unwanted.

`completion` runs the request. `http.logprobs` and the gRPC service format the values.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import AsyncIterable, AsyncIterator

from preft.core.errors import NumbersNotFinite
from preft.core.request import FinishReason, PromptLogprobs, TokenDelta
from preft.gateway.text.choice import ChoiceDelta


async def prompt_first(deltas: AsyncIterable[TokenDelta]) -> AsyncIterator[TokenDelta]:
    """The deltas of one prompt's choices, with the prompt's log probabilities in the first delta of each choice.

    On a colocated worker another choice may be faster than choice 0, which brings the values: its deltas wait. Raises
    NumbersNotFinite.
    """
    prompt: PromptLogprobs | None = None
    begun: set[int] = set()
    waiting: list[TokenDelta] = []
    async for delta in deltas:
        waiting.append(delta)
        if delta.prompt_logprobs is not None:
            prompt = delta.prompt_logprobs
            if not all(value < math.inf for value in prompt.logprobs):
                raise NumbersNotFinite("the model computed NaN or infinity in this request")
        if prompt is None:
            continue
        for ready in waiting:
            if ready.index not in begun:
                begun.add(ready.index)
                ready = dataclasses.replace(ready, prompt_logprobs=prompt)
            yield ready
        waiting.clear()


def without_output(delta: ChoiceDelta) -> ChoiceDelta:
    """The delta of a choice with `max_tokens` 0. An engine can't compute a prompt without sampling one token."""
    ended = FinishReason.LENGTH if delta.finish_reason is not None else None
    return dataclasses.replace(delta, text="", token_ids=(), logprobs=(), finish_reason=ended, stop_reason=None)
