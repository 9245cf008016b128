"""Every field survives the way to protobuf, over the wire and back."""

from __future__ import annotations

from typing import Any, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preft.core.request import AdapterRef, FinishReason, Sampling, TokenDelta, TokenLogprob
from preft.rpc import common_pb2, convert

ids = st.integers(0, 2**32 - 1)
id_tuples = st.lists(ids, max_size=4).map(tuple)
floats = st.floats(allow_nan=False)
tops = st.lists(st.tuples(ids, floats), max_size=3).map(tuple)
logprobs = st.lists(st.builds(TokenLogprob, ids, floats, ids, tops), max_size=3).map(tuple)
samplings = st.integers(1, 2**31 - 1).flatmap(
    lambda most: st.builds(
        Sampling,
        max_tokens=st.just(most),
        min_tokens=st.integers(0, most),
        temperature=st.floats(0, allow_infinity=False),
        top_p=st.floats(0, 1),
        top_k=st.integers(0, 2**31 - 1),
        min_p=st.floats(0, 1),
        presence_penalty=st.floats(-2, 2),
        frequency_penalty=st.floats(-2, 2),
        repetition_penalty=st.floats(0, allow_infinity=False),
        seed=st.none() | st.integers(-(2**63), 2**63 - 1),
        ignore_eos=st.booleans(),
        eos_token_ids=id_tuples,
        stop_token_ids=id_tuples,
        logit_bias=st.dictionaries(ids, st.floats(allow_nan=False, allow_infinity=False), max_size=3),
        logprobs=st.none() | st.integers(0, 20),
    )
)
deltas = st.builds(TokenDelta, ids, id_tuples, logprobs, st.none() | st.sampled_from(FinishReason), st.none() | ids)


@given(samplings)
def test_sampling(sampling: Sampling) -> None:
    wire = convert.sampling_to_proto(sampling).SerializeToString()
    assert convert.sampling_from_proto(common_pb2.Sampling.FromString(wire)) == sampling


@given(deltas)
def test_delta(delta: TokenDelta) -> None:
    wire = convert.delta_to_proto(delta).SerializeToString()
    assert convert.delta_from_proto(common_pb2.TokenDelta.FromString(wire)) == delta


def test_adapter() -> None:
    adapter = AdapterRef("user/ada", "d1" * 32, "/adapters/d1")
    wire = convert.adapter_to_proto(adapter).SerializeToString()
    assert convert.adapter_from_proto(common_pb2.AdapterRef.FromString(wire)) == adapter


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (Sampling, common_pb2.Sampling),
        (TokenDelta, common_pb2.TokenDelta),
        (TokenLogprob, common_pb2.TokenLogprob),
        (AdapterRef, common_pb2.AdapterRef),
    ],
)
def test_no_field_is_forgotten(cls: Any, message: Any) -> None:
    assert set(get_type_hints(cls)) == set(message.DESCRIPTOR.fields_by_name)
