"""A prompt's log probabilities come before all output, or the request fails."""

from __future__ import annotations

import math
from array import array
from collections.abc import AsyncIterator, Sequence

import pytest

from preft.core.errors import NumbersNotFinite
from preft.core.request import FinishReason, PromptLogprobs, TokenDelta
from preft.gateway.prompt_logprobs import prompt_first, without_output
from preft.gateway.text.choice import ChoiceDelta
from support.prompt_logprobs import made_up

PROMPT = made_up((5, 6, 7), 2)


async def ordered(*deltas: TokenDelta) -> list[TokenDelta]:
    async def source(deltas: Sequence[TokenDelta]) -> AsyncIterator[TokenDelta]:
        for delta in deltas:
            yield delta

    return [delta async for delta in prompt_first(source(deltas))]


async def test_no_choice_begins_before_the_prompt_is_there() -> None:
    """Choice 1 of a colocated worker may be faster. Each choice's first delta gets the values, in the old order."""
    found = await ordered(
        TokenDelta(1, (1,)), TokenDelta(1, (2,)), TokenDelta(0, (3,), prompt_logprobs=PROMPT), TokenDelta(2, (4,)),
        TokenDelta(0, (5,)),
    )  # fmt: skip
    assert [(delta.index, delta.token_ids, delta.prompt_logprobs is PROMPT) for delta in found] == [
        (1, (1,), True), (1, (2,), False), (0, (3,), True), (2, (4,), True), (0, (5,), False),
    ]  # fmt: skip


async def test_output_without_the_prompt_is_never_shown() -> None:
    assert await ordered(TokenDelta(1, (1,)), TokenDelta(0, (2,), finish_reason=FinishReason.LENGTH)) == []


@pytest.mark.parametrize("value", [math.nan, math.inf])
async def test_values_that_arent_finite_are_an_error(value: float) -> None:
    wrong = PromptLogprobs(0, array("I", [6, 7]), array("f", [-1.0, value]), array("I", [1, 1]))
    with pytest.raises(NumbersNotFinite):
        await ordered(TokenDelta(0, (3,), prompt_logprobs=wrong))
    minus = PromptLogprobs(0, array("I", [6]), array("f", [-math.inf]), array("I", [1]))
    assert len(await ordered(TokenDelta(0, (3,), prompt_logprobs=minus))) == 1


def test_an_unwanted_token_leaves_nothing() -> None:
    stopped = ChoiceDelta(1, "x", (3,), finish_reason=FinishReason.STOP, stop_reason=3, prompt_logprobs=PROMPT)
    assert without_output(stopped) == ChoiceDelta(1, "", (), (), FinishReason.LENGTH, None, prompt_logprobs=PROMPT)
    assert without_output(ChoiceDelta(0, "x", (3,))) == ChoiceDelta(0, "", ())
