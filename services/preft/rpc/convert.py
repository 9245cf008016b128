"""Translates between the core dataclasses and protobuf messages, both directions. Equal fields go by name.

`preft.core.request` and `preft.core.cluster` define the values' meaning. Messages of other processes are checked here
and nowhere later: an invalid message raises InvalidRequest if a caller sent it, EngineFailed if a worker did. A
value that its protobuf field can't hold (a negative count) raises ValueError in protobuf.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from typing import Any

from pydantic import TypeAdapter, ValidationError

from preft.core.cluster import (
    Adapter,
    AdapterState,
    AdapterStatus,
    StatusUpdate,
    Tier,
    TierTotals,
    WorkerStatus,
)
from preft.core.errors import EngineFailed, InvalidRequest
from preft.core.request import (
    MAX_CHOICES,
    PARAMETERS,
    AdapterRef,
    FinishReason,
    KvHeader,
    Sampling,
    TokenDelta,
    TokenLogprob,
)
from preft.rpc import adapters_pb2, common_pb2, kv_transfer_pb2, workers_pb2
from preft.rpc.checked import (
    MAX_TEXT,
    address_of,
    count_of,
    digest_of,
    handle_of,
    seconds_of,
    text_of,
)

_FINISH_TO_PROTO = {
    None: common_pb2.FINISH_REASON_UNSPECIFIED,
    FinishReason.STOP: common_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: common_pb2.FINISH_REASON_LENGTH,
    FinishReason.TOOL_CALLS: common_pb2.FINISH_REASON_TOOL_CALLS,
}
_FINISH_FROM_PROTO = {value: reason for reason, value in _FINISH_TO_PROTO.items()}

DIGEST_BYTES = 32
NO_TIERS = TierTotals()  # of a worker that runs no adapters
_TIERS = frozenset(Tier)

_STATE_TO_PROTO = {
    None: workers_pb2.ADAPTER_STATE_UNSPECIFIED,
    AdapterState.LOADING: workers_pb2.ADAPTER_STATE_LOADING,
    AdapterState.HOST: workers_pb2.ADAPTER_STATE_HOST,
    AdapterState.SLOT: workers_pb2.ADAPTER_STATE_SLOT,
}
_STATE_FROM_PROTO = {value: state for state, value in _STATE_TO_PROTO.items()}

_SAMPLING = TypeAdapter(Sampling)
_ADAPTER_REF, _KV_HEADER, _TIER_TOTALS = (
    tuple(field.name for field in fields(kind)) for kind in (AdapterRef, KvHeader, TierTotals)
)
_USE = tuple(field.name for field in fields(WorkerStatus) if field.name != "tiers")


def sampling_to_proto(sampling: Sampling) -> common_pb2.Sampling:
    values = _named(sampling, PARAMETERS)
    if sampling.structured_outputs is not None:
        values["structured_outputs"] = common_pb2.StructuredOutputs(**asdict(sampling.structured_outputs))
    return common_pb2.Sampling(**values)


def sampling_from_proto(message: common_pb2.Sampling) -> Sampling:
    """Inverse of `sampling_to_proto`, within vLLM's ranges. Raises InvalidRequest."""
    try:
        sampling = _SAMPLING.validate_python(given_parameters(message))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        param = str(first["loc"][0])
        raise InvalidRequest(f"{param}: {first['msg']}", param=param) from None
    if sampling.min_tokens > sampling.max_tokens:
        raise InvalidRequest("min_tokens is more than max_tokens", param="min_tokens")
    return sampling


def given_parameters(message: common_pb2.Sampling | common_pb2.StructuredOutputs) -> dict[str, Any]:
    """The parameters that `message` has, unchecked. An empty list or map counts as absent."""
    given: dict[str, Any] = {}
    for field, value in message.ListFields():
        if field.message_type is not None:
            value = dict(value) if field.message_type.GetOptions().map_entry else given_parameters(value)
        elif field.is_repeated:
            value = list(value)
        given[field.name] = value
    return given


def check_prefill(message: workers_pb2.PrefillRequest) -> None:
    """Raises InvalidRequest for an invalid field. The translation checks sampling and adapter."""
    text_of(message.request_id, "request_id")
    text_of(message.cache_salt, "cache_salt")
    count_of(message.n, "n", 1, MAX_CHOICES)
    if message.HasField("target"):
        handle_of(message.target.handle)
        address_of(message.target.address)


def check_decode(message: workers_pb2.DecodeRequest) -> None:
    """Raises InvalidRequest for an invalid field. The translation checks sampling and adapter."""
    text_of(message.request_id, "request_id")
    handle_of(message.handle)
    digest_of(message.adapter_digest)
    text_of(message.cache_salt, "cache_salt")
    for choice in message.choices:
        count_of(choice.index, "index", 0, MAX_CHOICES - 1)
    seconds_of(message.kv_timeout, "kv_timeout")


def adapter_to_proto(adapter: AdapterRef) -> common_pb2.AdapterRef:
    return common_pb2.AdapterRef(**_named(adapter, _ADAPTER_REF))


def adapter_from_proto(message: common_pb2.AdapterRef) -> AdapterRef:
    """Inverse of `adapter_to_proto`. Raises InvalidRequest."""
    return AdapterRef(text_of(message.name, "name"), message.digest, text_of(message.source, "source", MAX_TEXT))


def header_to_proto(header: KvHeader) -> kv_transfer_pb2.KvHeader:
    return kv_transfer_pb2.KvHeader(**_named(header, _KV_HEADER))


def header_from_proto(message: kv_transfer_pb2.KvHeader) -> KvHeader:
    """Inverse of `header_to_proto`. Raises InvalidRequest. `HandleTable.open` checks sizes and fingerprint."""
    handle_of(message.handle)
    text_of(message.fingerprint, "fingerprint")
    digest_of(message.adapter_digest)
    count_of(message.uses, "uses", 1, MAX_CHOICES)
    return KvHeader(**_named(message, _KV_HEADER))


def entry_to_proto(entry: Adapter) -> adapters_pb2.Adapter:
    """A catalog entry as the public API shows it."""
    return adapters_pb2.Adapter(**_named(entry, adapters_pb2.Adapter.DESCRIPTOR.fields_by_name))


def _named(values: object, names: Iterable[str]) -> dict[str, Any]:
    """These attributes of a dataclass or message, for the constructor of the other: both have equal names."""
    return {name: getattr(values, name) for name in names}


def delta_to_proto(delta: TokenDelta) -> common_pb2.TokenDelta:
    """On the per-token path. The prompt's log probabilities travel apart, see `prompt_logprobs`."""
    message = common_pb2.TokenDelta(
        index=delta.index,
        token_ids=delta.token_ids,
        finish_reason=_FINISH_TO_PROTO[delta.finish_reason],
        cached_tokens=delta.cached_tokens,
    )
    if delta.logprobs:
        message.logprobs.extend([_logprob_to_proto(logprob) for logprob in delta.logprobs])
    if delta.stop_token_id is not None:
        message.stop_token_id = delta.stop_token_id
    return message


def delta_from_proto(message: common_pb2.TokenDelta) -> TokenDelta:
    """Inverse of `delta_to_proto`, on the per-token path. Raises EngineFailed for an unknown finish reason."""
    if message.finish_reason not in _FINISH_FROM_PROTO:
        raise EngineFailed(f"a worker ended a choice for the unknown reason {message.finish_reason}")
    return TokenDelta(
        message.index,
        tuple(message.token_ids),
        tuple([_logprob_from_proto(logprob) for logprob in message.logprobs]) if message.logprobs else (),
        _FINISH_FROM_PROTO[message.finish_reason],
        message.stop_token_id if message.HasField("stop_token_id") else None,
        message.cached_tokens,
    )


def status_to_proto(update: StatusUpdate, previous: WorkerStatus | None = None) -> workers_pb2.StatusUpdate:
    """One message of a worker's status stream. It holds the tiers only if they differ from the last, `previous`."""
    tiers, known = update.status.tiers, previous.tiers if previous is not None else NO_TIERS
    return workers_pb2.StatusUpdate(
        whole=update.is_whole,
        adapters=[
            workers_pb2.AdapterStatus(
                digest=bytes.fromhex(digest), state=_STATE_TO_PROTO[adapter.state], other_prompts=adapter.other_prompts
            )
            for digest, adapter in update.adapters.items()
        ],
        tiers=None if tiers == known else workers_pb2.TierTotals(**_named(tiers, _TIER_TOTALS)),
        **_named(update.status, _USE),
    )


def status_from_proto(message: workers_pb2.StatusUpdate, previous: WorkerStatus | None = None) -> StatusUpdate:
    """Inverse of `status_to_proto`; `previous` is the stream's last status, or None at its start.

    Raises EngineFailed for a digest of another length, an unknown state or tier, or a time that isn't a number.
    """
    tiers = previous.tiers if previous is not None else NO_TIERS
    if message.HasField("tiers"):
        tiers = _tiers_from_proto(message.tiers)
    status = WorkerStatus(**_named(message, _USE), tiers=tiers)
    return StatusUpdate(status, dict(map(_adapter_status, message.adapters)), message.whole)


def _adapter_status(message: workers_pb2.AdapterStatus) -> tuple[str, AdapterStatus]:
    if len(message.digest) != DIGEST_BYTES:
        raise EngineFailed(f"a worker names an adapter by {len(message.digest)} bytes, not by {DIGEST_BYTES}")
    if message.state not in _STATE_FROM_PROTO:
        raise EngineFailed(f"a worker has an adapter in the unknown state {message.state}")
    return message.digest.hex(), AdapterStatus(_STATE_FROM_PROTO[message.state], message.other_prompts)


def _tiers_from_proto(message: workers_pb2.TierTotals) -> TierTotals:
    totals = _named(message, _TIER_TOTALS)
    for name in ("hits", "loads", "load_seconds"):
        totals[name] = _by_tier(totals[name])
    if not all(math.isfinite(seconds) and seconds >= 0 for seconds in totals["load_seconds"].values()):
        raise EngineFailed("a worker's time for loads isn't a number of seconds")
    return TierTotals(**totals)


def _by_tier(numbers: Mapping[str, float]) -> dict[Tier, float]:
    for name in numbers:
        if name not in _TIERS:
            raise EngineFailed(f"a worker names the unknown tier {name[:40]!r}")
    return {Tier(name): number for name, number in numbers.items()}


def _logprob_to_proto(logprob: TokenLogprob) -> common_pb2.TokenLogprob:
    return common_pb2.TokenLogprob(
        token_id=logprob.token_id,
        logprob=logprob.logprob,
        rank=logprob.rank,
        top=[common_pb2.TopLogprob(token_id=token_id, logprob=value) for token_id, value in logprob.top],
    )


def _logprob_from_proto(message: common_pb2.TokenLogprob) -> TokenLogprob:
    return TokenLogprob(
        token_id=message.token_id,
        logprob=message.logprob,
        rank=message.rank,
        top=tuple([(entry.token_id, entry.logprob) for entry in message.top]),
    )
