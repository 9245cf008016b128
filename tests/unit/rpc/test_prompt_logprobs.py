"""A prompt's log probabilities arrive whole, in small messages, or as an error."""

from __future__ import annotations

import random
from array import array

import pytest

from preft.core.errors import EngineFailed
from preft.core.request import PromptLogprobs, TokenDelta
from preft.rpc import common_pb2
from preft.rpc.prompt_logprobs import PART_VALUES, PromptParts, part_deltas, prompt_parts


def values(tokens: int, top: int) -> PromptLogprobs:
    draw, count = random.Random(tokens), (tokens - 1) * (top + 1)
    return PromptLogprobs(
        top,
        array("I", (draw.randrange(2**32) for _ in range(count))),
        array("f", (draw.choice((-draw.random(), -float("inf"))) for _ in range(count))),
        array("I", (draw.randrange(1, 2**32) for _ in range(tokens - 1))),
    )


@pytest.mark.parametrize(("tokens", "top"), [(1, 3), (2, 0), (900, 20), (16_385, 0), (16_386, 0), (9_000, 1)])
def test_values_arrive_as_they_were(tokens: int, top: int) -> None:
    whole, parts = values(tokens, top), PromptParts(top, tokens)
    messages = [common_pb2.PromptLogprobs.FromString(part.SerializeToString()) for part in prompt_parts(whole)]
    for message in messages:
        assert len(message.token_ids) <= PART_VALUES
        parts.add(message)
    assert parts.whole() == whole
    assert len(messages) == max(1, -(-(tokens - 1) // (PART_VALUES // (top + 1))))


def test_a_long_prompts_messages_stay_small() -> None:
    sizes = [part.ByteSize() for part in prompt_parts(values(32_000, 20))]
    assert max(sizes) < 200_000
    assert sum(sizes) < 8_000_000


def test_rows_are_tokens_with_their_alternatives() -> None:
    token_ids, values = array("I", [5, 7, 5, 9, 1, 2]), array("f", [-1, -0.5, -1, -4, -0.5, -2])
    logprobs = PromptLogprobs(2, token_ids, values, array("I", [2, 8]))
    first, second = logprobs
    assert len(logprobs) == 2
    assert (first.token_id, first.logprob, first.rank, first.top) == (5, -1, 2, ((7, -0.5), (5, -1)))
    assert (second.token_id, second.logprob, second.rank, second.top) == (9, -4, 8, ((1, -0.5), (2, -2)))


def test_parts_go_before_their_delta() -> None:
    assert list(part_deltas(TokenDelta(3, (1,)))) == []
    [part] = part_deltas(TokenDelta(3, (1,), prompt_logprobs=values(4, 1)))
    assert (part.index, list(part.token_ids), len(part.prompt_logprobs.ranks)) == (3, [], 3)


def test_nothing_is_wanted_and_nothing_comes() -> None:
    assert PromptParts(None, 5).whole() is None
    with pytest.raises(EngineFailed, match="than it was asked for"):
        PromptParts(None, 5).add(next(prompt_parts(values(5, 0))))


@pytest.mark.parametrize(
    "wrong",
    [
        [],  # an older worker that doesn't know the parameter
        [values(4, 2)],
        [values(6, 2)],
        [values(5, 2), values(2, 2)],
        [values(5, 1)],
        [PromptLogprobs(2, array("I", [1] * 12), array("f", [0.0] * 11), array("I", [1] * 4))],
        [PromptLogprobs(2, array("I", [1] * 11), array("f", [0.0] * 12), array("I", [1] * 4))],
    ],
    ids=["none", "too few", "too many", "twice", "other top", "a value short", "a token short"],
)
def test_what_doesnt_fit_the_prompt_is_an_error(wrong: list[PromptLogprobs]) -> None:
    with pytest.raises(EngineFailed, match="log probabilities"):
        join(wrong)


def join(parts: list[PromptLogprobs]) -> None:
    joined = PromptParts(2, 5)
    for one in parts:
        joined.add(
            common_pb2.PromptLogprobs(top=one.top, token_ids=one.token_ids, logprobs=one.logprobs, ranks=one.ranks)
        )
    joined.whole()
