"""Workloads keep their promises for every seed and size; conversations grow turn by turn."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preft_loadgen.errors import InvalidArgument
from preft_loadgen.traffic.choice import RoundRobin, Uniform, Zipf
from preft_loadgen.traffic.lengths import Lengths
from preft_loadgen.traffic.prompts import Ids, RandomPrompts, Words
from preft_loadgen.traffic.request import Request, Turn
from preft_loadgen.traffic.workload import Workload

PROMPT, OUTPUT = Lengths(2, 9), Lengths(3, 7)
workloads = st.builds(
    Workload,
    models=st.lists(st.sampled_from("abcdefgh"), min_size=1, unique=True).map(tuple),
    requests=st.integers(1, 60),
    prompts=st.sampled_from([RandomPrompts(PROMPT, OUTPUT), RandomPrompts(PROMPT, OUTPUT, Words())]),
    choice=st.sampled_from([Uniform(), RoundRobin(), Zipf()]),
    turns=st.sampled_from([Lengths(1, 1), Lengths(1, 4)]),
    cancel=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 5),
)


@settings(deadline=None)
@given(workloads)
def test_every_request_is_within_bounds(workload: Workload) -> None:
    requests = workload.make()
    assert len(requests) == workload.requests
    for request in requests:
        assert request.model in workload.models
        words = request.prompt.split() if isinstance(request.prompt, str) else request.prompt
        assert PROMPT.low <= len(words) <= PROMPT.high
        assert OUTPUT.low <= request.output_tokens <= OUTPUT.high
        assert request.cancel_after is None or 1 <= request.cancel_after < request.output_tokens
        assert not (request.cancel_after and request.later)
        assert request.wants_ids == (bool(request.later) and not isinstance(request.prompt, str))


@settings(deadline=None)
@given(workloads)
def test_equal_seeds_equal_requests(workload: Workload) -> None:
    assert workload.make() == workload.make()


def test_seeds_differ() -> None:
    made = [Workload(("a",), 5, RandomPrompts(Lengths(8, 8), OUTPUT), seed=seed).make() for seed in (0, 1)]
    assert made[0] != made[1]


def test_the_share_of_cancelled_requests() -> None:
    requests = Workload(("a",), 1000, RandomPrompts(PROMPT, OUTPUT), cancel=0.3).make()
    assert sum(request.cancel_after is not None for request in requests) == pytest.approx(300, rel=0.15)


def test_a_conversation_of_ids_and_one_of_text() -> None:
    request = Request("m", (1, 2), 3, later=(Turn((5,), 4), Turn((6, 7), 5)))
    second = request.after((3, 4))
    third = second.after((9,))
    assert (second.whole_prompt(), second.output_tokens) == ((1, 2, 3, 4, 5), 4)
    assert (third.whole_prompt(), third.output_tokens, third.later) == ((1, 2, 3, 4, 5, 9, 6, 7), 5, ())
    spoken = Request("m", "hi", 3, later=(Turn(" and?", 4),)).after(" there")
    assert spoken.whole_prompt() == "hi there and?"
    assert request.ids == (1, 2)


def test_impossible_workloads() -> None:
    prompts = RandomPrompts(PROMPT, OUTPUT, Ids())
    for wrong in (
        lambda: Workload((), 1, prompts),
        lambda: Workload(("a",), 0, prompts),
        lambda: Workload(("a",), 1, prompts, cancel=1.5),
        lambda: Workload(("a",), 1, prompts, cancel=float("nan")),
    ):
        with pytest.raises(InvalidArgument):
            wrong()
