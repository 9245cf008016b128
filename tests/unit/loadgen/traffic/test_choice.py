"""Choices of adapters: shares, order, drift, and what can't be read."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preft_loadgen.errors import InvalidArgument
from preft_loadgen.traffic.choice import Choice, RoundRobin, Uniform, Weights, Zipf, parse_choice

MODELS = ("a", "b", "c", "d")
choices = st.sampled_from([RoundRobin(), Uniform(), Weights((3.0, 1.0)), Zipf(), Zipf(0.5, 3)])


@settings(deadline=None)
@given(choices, st.integers(1, 4), st.integers(1, 60), st.integers(0, 3))
def test_every_choice_draws_known_models_and_repeats(choice: Choice, models: int, count: int, seed: int) -> None:
    drawn = choice.draw(MODELS[:models], count, random.Random(seed))
    assert len(drawn) == count
    assert set(drawn) <= set(MODELS[:models])
    assert drawn == choice.draw(MODELS[:models], count, random.Random(seed))


def test_round_robin_and_uniform() -> None:
    assert RoundRobin().draw(MODELS, 6, random.Random(0)) == ["a", "b", "c", "d", "a", "b"]
    drawn = Uniform().draw(MODELS, 42, random.Random(0))
    assert max(Counter(drawn).values()) - min(Counter(drawn).values()) <= 1
    assert drawn != RoundRobin().draw(MODELS, 42, random.Random(0))


def test_weights_and_zipf_have_their_shares() -> None:
    weighed = Counter(Weights((6.0, 2.0, 1.0)).draw(MODELS, 10_000, random.Random(0)))  # d has c's weight
    assert [weighed[model] / 1000 for model in MODELS] == pytest.approx([6, 2, 1, 1], rel=0.1)
    ranked = Counter(Zipf(1.5).draw(MODELS, 10_000, random.Random(0)))
    total = sum(rank**-1.5 for rank in range(1, 5))
    assert [ranked[model] for model in MODELS] == pytest.approx(
        [10_000 * rank**-1.5 / total for rank in range(1, 5)], rel=0.1
    )


def test_drift_makes_the_least_popular_model_the_most_popular() -> None:
    drawn = Zipf(2.0, drift=5000).draw(MODELS, 15_000, random.Random(0))
    order = [[model for model, _ in Counter(drawn[start : start + 5000]).most_common()] for start in (0, 5000, 10_000)]
    assert order == [["a", "b", "c", "d"], ["d", "a", "b", "c"], ["c", "d", "a", "b"]]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("uniform", Uniform()),
        ("round-robin", RoundRobin()),
        ("weights:5,3,1", Weights((5.0, 3.0, 1.0))),
        ("zipf", Zipf()),
        ("zipf:1.2", Zipf(1.2)),
        ("drift:1.2,50", Zipf(1.2, 50)),
    ],
)
def test_what_is_read(text: str, expected: Choice) -> None:
    assert parse_choice(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "often",
        "uniform:1",
        "weights:",
        "weights:1,-1",
        "weights:0",
        "weights:nan",
        "zipf:x",
        "zipf:-1",
        "zipf:99",
        "drift:1",
        "drift:1,0",
        "drift:1,x",
        "drift:1,2,3",
    ],
)
def test_what_is_none(text: str) -> None:
    with pytest.raises(InvalidArgument):
        parse_choice(text)
