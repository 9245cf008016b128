"""Workloads keep their promises for every seed and size."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preft_loadgen.errors import InvalidArgument
from preft_loadgen.workload import Lengths, Popularity, Workload, poisson_arrivals

lengths = st.tuples(st.integers(1, 40), st.integers(0, 20)).map(lambda pair: Lengths(pair[0], pair[0] + pair[1]))
workloads = st.builds(
    Workload,
    models=st.lists(st.sampled_from("abcdefgh"), min_size=1, unique=True).map(tuple),
    requests=st.integers(1, 60),
    prompt=lengths,
    output=lengths,
    popularity=st.sampled_from(Popularity),
    seed=st.integers(0, 5),
    vocabulary=st.integers(4, 300),
)


@given(workloads)
def test_every_request_is_within_bounds(workload: Workload) -> None:
    requests = workload.make()
    assert len(requests) == workload.requests
    for request in requests:
        assert request.model in workload.models
        assert workload.prompt.low <= len(request.prompt) <= workload.prompt.high
        assert workload.output.low <= request.output_tokens <= workload.output.high
        assert all(workload.first_id <= token < workload.vocabulary for token in request.prompt)


@given(workloads)
def test_equal_seeds_equal_requests(workload: Workload) -> None:
    assert workload.make() == workload.make()


@given(workloads.filter(lambda workload: workload.popularity is Popularity.UNIFORM))
def test_uniform_is_even(workload: Workload) -> None:
    counts = Counter(request.model for request in workload.make())
    shares = [counts[model] for model in workload.models]
    assert max(shares) - min(shares) <= 1


def test_seeds_differ() -> None:
    made = [Workload(("a",), 5, Lengths(8, 8), Lengths(1, 1), seed=seed).make() for seed in (0, 1)]
    assert made[0] != made[1]


def test_zipf_prefers_the_first() -> None:
    workload = Workload(("a", "b", "c", "d"), 5000, Lengths(1, 1), Lengths(1, 1), Popularity.ZIPF)
    counts = Counter(request.model for request in workload.make())
    for rank, model in enumerate(workload.models):
        assert counts[model] == pytest.approx(5000 * (1 / (rank + 1)) / (1 + 1 / 2 + 1 / 3 + 1 / 4), rel=0.15)


@given(st.floats(0.1, 1000), st.integers(1, 50), st.integers(0, 3))
def test_arrivals_ascend_and_repeat(rate: float, count: int, seed: int) -> None:
    arrivals = poisson_arrivals(rate, count, seed)
    assert len(arrivals) == count
    assert arrivals == sorted(arrivals)
    assert arrivals[0] > 0
    assert arrivals == poisson_arrivals(rate, count, seed)


def test_arrivals_have_their_rate() -> None:
    assert poisson_arrivals(50, 20_000)[-1] == pytest.approx(400, rel=0.05)


@pytest.mark.parametrize(("text", "expected"), [("128", Lengths(128, 128)), ("64-256", Lengths(64, 256))])
def test_lengths_are_read(text: str, expected: Lengths) -> None:
    assert Lengths.parse(text) == expected


@pytest.mark.parametrize("text", ["", "0", "-3", "5-", "9-3", "a", "1-2-3", "1.5"])
def test_lengths_that_are_none(text: str) -> None:
    with pytest.raises(InvalidArgument):
        Lengths.parse(text)


def test_impossible_workloads() -> None:
    one = Lengths(1, 1)
    with pytest.raises(InvalidArgument):
        Workload((), 1, one, one)
    with pytest.raises(InvalidArgument):
        Workload(("a",), 1, one, one, vocabulary=3)
    with pytest.raises(InvalidArgument):
        poisson_arrivals(0, 1)
