"""Every field survives the way to protobuf, over the wire and back."""

from __future__ import annotations

import dataclasses
from typing import Any, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preft.core.cluster import AdapterState, AdapterStatus, StatusUpdate, Tier, TierTotals, WorkerStatus
from preft.core.errors import EngineFailed, InvalidRequest
from preft.core.request import AdapterRef, FinishReason, KvHeader, Sampling, TokenDelta, TokenLogprob
from preft.core.structured import StructuredOutputs
from preft.rpc import common_pb2, convert, kv_transfer_pb2, workers_pb2

ids = st.integers(0, 2**32 - 1)
id_tuples = st.lists(ids, max_size=4).map(tuple)
floats = st.floats(allow_nan=False)
tops = st.lists(st.tuples(ids, floats), max_size=3).map(tuple)
logprobs = st.lists(st.builds(TokenLogprob, ids, floats, ids, tops), max_size=3).map(tuple)
options = {
    "whitespace_pattern": st.none() | st.text(max_size=5),
    "disable_additional_properties": st.booleans(),
}
forms = st.one_of(
    st.builds(StructuredOutputs, json=st.sampled_from(["{}", "true"]), **options),
    st.builds(StructuredOutputs, regex=st.text(max_size=5)),
    st.builds(StructuredOutputs, choice=st.lists(st.text(max_size=5), min_size=1, max_size=3).map(tuple)),
    st.builds(StructuredOutputs, grammar=st.just("start: A"), disable_any_whitespace=st.booleans()),
    st.builds(StructuredOutputs, json_object=st.just(True), **options),
    st.builds(StructuredOutputs, structural_tag=st.just("{}"), **options),
)
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
        structured_outputs=st.none() | forms,
        prompt_logprobs=st.none() | st.integers(0, 20),
        allowed_token_ids=id_tuples,
    )
)
deltas = st.builds(TokenDelta, ids, id_tuples, logprobs, st.none() | st.sampled_from(FinishReason), st.none() | ids)

longs = st.integers(0, 2**64 - 1)
tiers = st.builds(
    TierTotals,
    ids, ids, longs, longs, longs, longs, longs,
    hits=st.dictionaries(st.sampled_from(Tier), longs),
    loads=st.dictionaries(st.sampled_from(Tier), longs),
    load_seconds=st.dictionaries(st.sampled_from(Tier), st.floats(0, allow_infinity=False)),
)  # fmt: skip
statuses = st.builds(
    WorkerStatus, st.booleans(), ids, longs, longs, longs, ids, longs, ids, ids, longs, ids, ids, tiers
)
updates = st.builds(
    StatusUpdate,
    statuses,
    st.dictionaries(
        st.binary(min_size=32, max_size=32).map(bytes.hex),
        st.builds(AdapterStatus, st.none() | st.sampled_from(AdapterState), ids),
        max_size=4,
    ),
    st.booleans(),
)


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
        (KvHeader, kv_transfer_pb2.KvHeader),
    ],
)
def test_no_field_is_forgotten(cls: Any, message: Any) -> None:
    assert set(get_type_hints(cls)) == set(message.DESCRIPTOR.fields_by_name)


@given(updates, updates)
def test_status(first: StatusUpdate, second: StatusUpdate) -> None:
    """A stream of two messages, of which the second one may have the tiers of the first."""
    for tiers in (second.status.tiers, first.status.tiers):
        second = dataclasses.replace(second, status=dataclasses.replace(second.status, tiers=tiers))
        wires = [
            convert.status_to_proto(update, previous).SerializeToString()
            for update, previous in ((first, None), (second, first.status))
        ]
        messages = [workers_pb2.StatusUpdate.FromString(wire) for wire in wires]
        assert messages[1].HasField("tiers") is (tiers != first.status.tiers)
        got = convert.status_from_proto(messages[0])
        assert got == first
        assert convert.status_from_proto(messages[1], got.status) == second


def test_tiers_of_a_worker_without_adapters_are_not_sent() -> None:
    message = convert.status_to_proto(StatusUpdate(WorkerStatus(running=1)))
    assert not message.HasField("tiers")
    assert convert.status_from_proto(message).status.tiers == TierTotals()


def spoiled(path: str, value: Any) -> workers_pb2.StatusUpdate:
    tiers = TierTotals(hits={Tier.HOST: 1}, load_seconds={Tier.DISK: 0.5})
    adapters = {"d1" * 32: AdapterStatus(AdapterState.HOST)}
    message = convert.status_to_proto(StatusUpdate(WorkerStatus(tiers=tiers), adapters))
    owner = message.adapters[0] if path in ("digest", "state") else message.tiers
    if path in ("digest", "state"):
        setattr(owner, path, value)
    else:
        getattr(owner, path)[value[0]] = value[1]
    return message


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("digest", b"", "by 0 bytes, not by 32"),
        ("digest", bytes(31), "by 31 bytes"),
        ("digest", bytes(33), "by 33 bytes"),
        ("state", 4, "unknown state 4"),
        ("hits", ("tape", 1), "unknown tier 'tape'"),
        ("loads", ("", 1), "unknown tier ''"),
        ("load_seconds", ("x" * 1000, 1.0), "unknown tier 'x{40}'"),
        ("load_seconds", ("disk", float("nan")), "isn't a number of seconds"),
        ("load_seconds", ("disk", float("inf")), "isn't a number of seconds"),
        ("load_seconds", ("disk", -1.0), "isn't a number of seconds"),
    ],
)
def test_a_worker_s_malformed_status_is_its_failure(path: str, value: Any, says: str) -> None:
    with pytest.raises(EngineFailed, match=says):
        convert.status_from_proto(spoiled(path, value))


def test_no_field_of_a_status_is_forgotten() -> None:
    own = set(get_type_hints(WorkerStatus)) | {"whole", "adapters"}
    assert own == set(workers_pb2.StatusUpdate.DESCRIPTOR.fields_by_name)
    assert set(get_type_hints(TierTotals)) == set(workers_pb2.TierTotals.DESCRIPTOR.fields_by_name)
    assert {"digest", *get_type_hints(AdapterStatus)} == set(workers_pb2.AdapterStatus.DESCRIPTOR.fields_by_name)


@pytest.mark.parametrize("form", [{}, {"regex": "a", "grammar": "b"}, {"json": "{"}, {"regex": "a" * 70_000}])
def test_an_invalid_form_of_output(form: dict[str, str]) -> None:
    message = common_pb2.Sampling(max_tokens=1, structured_outputs=common_pb2.StructuredOutputs(**form))
    with pytest.raises(InvalidRequest) as caught:
        convert.sampling_from_proto(message)
    assert caught.value.param == "structured_outputs"
