"""Translates between the core dataclasses and protobuf messages, both directions, field by field.

`preft.core.request` and `preft.core.cluster` define the values' meaning. Messages of other processes are checked here
and nowhere later: an invalid message raises InvalidRequest if a caller sent it, EngineFailed if a worker did. A
value that its protobuf field can't hold (a negative count) raises ValueError in protobuf.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TypeVar

from preft.core.cluster import (
    AdapterState,
    AdapterStatus,
    StatusUpdate,
    Tier,
    TierTotals,
    WorkerStatus,
)
from preft.core.errors import EngineFailed
from preft.core.request import MAX_CHOICES, NO_BIAS, AdapterRef, FinishReason, Sampling, TokenDelta, TokenLogprob
from preft.rpc import common_pb2, workers_pb2
from preft.rpc.checked import (
    MAX_TEXT,
    address_of,
    count_of,
    digest_of,
    handle_of,
    ids_of,
    number_of,
    seconds_of,
    text_of,
)

INT32_MAX = 2**31 - 1
MAX_LOGPROBS = 20  # vLLM's limit

_FINISH_TO_PROTO = {
    None: common_pb2.FINISH_REASON_UNSPECIFIED,
    FinishReason.STOP: common_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: common_pb2.FINISH_REASON_LENGTH,
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

N = TypeVar("N", int, float)


def sampling_to_proto(sampling: Sampling) -> common_pb2.Sampling:
    return common_pb2.Sampling(
        max_tokens=sampling.max_tokens,
        min_tokens=sampling.min_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        repetition_penalty=sampling.repetition_penalty,
        seed=sampling.seed,
        ignore_eos=sampling.ignore_eos,
        eos_token_ids=sampling.eos_token_ids,
        stop_token_ids=sampling.stop_token_ids,
        logit_bias=sampling.logit_bias,
        logprobs=sampling.logprobs,
    )


def sampling_from_proto(message: common_pb2.Sampling) -> Sampling:
    """Inverse of `sampling_to_proto`, within vLLM's ranges. Raises InvalidRequest."""
    bias = {token_id: number_of(message.logit_bias[token_id], "logit_bias") for token_id in message.logit_bias}
    ids_of(bias, "logit_bias")
    max_tokens = count_of(message.max_tokens, "max_tokens", 1, INT32_MAX)
    return Sampling(
        max_tokens=max_tokens,
        min_tokens=count_of(message.min_tokens, "min_tokens", 0, max_tokens),
        temperature=number_of(message.temperature, "temperature", 0),
        top_p=number_of(message.top_p, "top_p", 0, 1),
        top_k=count_of(message.top_k, "top_k", 0, INT32_MAX),
        min_p=number_of(message.min_p, "min_p", 0, 1),
        presence_penalty=number_of(message.presence_penalty, "presence_penalty", -2, 2),
        frequency_penalty=number_of(message.frequency_penalty, "frequency_penalty", -2, 2),
        repetition_penalty=number_of(message.repetition_penalty, "repetition_penalty", 0),
        seed=message.seed if message.HasField("seed") else None,
        ignore_eos=message.ignore_eos,
        eos_token_ids=ids_of(message.eos_token_ids, "eos_token_ids"),
        stop_token_ids=ids_of(message.stop_token_ids, "stop_token_ids"),
        logit_bias=bias or NO_BIAS,
        logprobs=count_of(message.logprobs, "logprobs", 0, MAX_LOGPROBS) if message.HasField("logprobs") else None,
    )


def check_prefill(message: workers_pb2.PrefillRequest) -> None:
    """Raises InvalidRequest for an invalid field. The translation checks sampling and adapter."""
    text_of(message.request_id, "request_id")
    count_of(message.n, "n", 1, MAX_CHOICES)
    if message.HasField("target"):
        handle_of(message.target.handle)
        address_of(message.target.address)


def check_decode(message: workers_pb2.DecodeRequest) -> None:
    """Raises InvalidRequest for an invalid field. The translation checks sampling and adapter."""
    text_of(message.request_id, "request_id")
    handle_of(message.handle)
    digest_of(message.adapter_digest)
    for choice in message.choices:
        count_of(choice.index, "index", 0, MAX_CHOICES - 1)
    seconds_of(message.kv_timeout, "kv_timeout")


def adapter_to_proto(adapter: AdapterRef) -> common_pb2.AdapterRef:
    return common_pb2.AdapterRef(name=adapter.name, digest=adapter.digest, source=adapter.source)


def adapter_from_proto(message: common_pb2.AdapterRef) -> AdapterRef:
    """Inverse of `adapter_to_proto`. Raises InvalidRequest."""
    return AdapterRef(text_of(message.name, "name"), message.digest, text_of(message.source, "source", MAX_TEXT))


def delta_to_proto(delta: TokenDelta) -> common_pb2.TokenDelta:
    """On the per-token path."""
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
    status, tiers = update.status, update.status.tiers
    known = previous.tiers if previous is not None else NO_TIERS
    return workers_pb2.StatusUpdate(
        whole=update.is_whole,
        draining=status.draining,
        running=status.running,
        kv_blocks_used=status.kv_blocks_used,
        staging_bytes_used=status.staging_bytes_used,
        staging_bytes_fit=status.staging_bytes_fit,
        open_handles=status.open_handles,
        preemptions=status.preemptions,
        other_prefills=status.other_prefills,
        other_sequences=status.other_sequences,
        adapters=[
            workers_pb2.AdapterStatus(
                digest=bytes.fromhex(digest), state=_STATE_TO_PROTO[adapter.state], other_prompts=adapter.other_prompts
            )
            for digest, adapter in update.adapters.items()
        ],
        tiers=None if tiers == known else _tiers_to_proto(tiers),
    )


def status_from_proto(message: workers_pb2.StatusUpdate, previous: WorkerStatus | None = None) -> StatusUpdate:
    """Inverse of `status_to_proto`; `previous` is the stream's last status, or None at its start.

    Raises EngineFailed for a digest of another length, an unknown state or tier, or a time that isn't a number.
    """
    tiers = previous.tiers if previous is not None else NO_TIERS
    status = WorkerStatus(
        draining=message.draining,
        running=message.running,
        kv_blocks_used=message.kv_blocks_used,
        staging_bytes_used=message.staging_bytes_used,
        staging_bytes_fit=message.staging_bytes_fit,
        open_handles=message.open_handles,
        preemptions=message.preemptions,
        other_prefills=message.other_prefills,
        other_sequences=message.other_sequences,
        tiers=_tiers_from_proto(message.tiers) if message.HasField("tiers") else tiers,
    )
    return StatusUpdate(status, dict(map(_adapter_status, message.adapters)), message.whole)


def _adapter_status(message: workers_pb2.AdapterStatus) -> tuple[str, AdapterStatus]:
    if len(message.digest) != DIGEST_BYTES:
        raise EngineFailed(f"a worker names an adapter by {len(message.digest)} bytes, not by {DIGEST_BYTES}")
    if message.state not in _STATE_FROM_PROTO:
        raise EngineFailed(f"a worker has an adapter in the unknown state {message.state}")
    return message.digest.hex(), AdapterStatus(_STATE_FROM_PROTO[message.state], message.other_prompts)


def _tiers_to_proto(tiers: TierTotals) -> workers_pb2.TierTotals:
    return workers_pb2.TierTotals(
        slots_used=tiers.slots_used,
        host_adapters=tiers.host_adapters,
        host_bytes=tiers.host_bytes,
        host_bytes_total=tiers.host_bytes_total,
        disk_bytes=tiers.disk_bytes,
        host_evictions=tiers.host_evictions,
        disk_evictions=tiers.disk_evictions,
        hits={tier.value: number for tier, number in tiers.hits.items()},
        loads={tier.value: number for tier, number in tiers.loads.items()},
        load_seconds={tier.value: number for tier, number in tiers.load_seconds.items()},
    )


def _tiers_from_proto(message: workers_pb2.TierTotals) -> TierTotals:
    return TierTotals(
        slots_used=message.slots_used,
        host_adapters=message.host_adapters,
        host_bytes=message.host_bytes,
        host_bytes_total=message.host_bytes_total,
        disk_bytes=message.disk_bytes,
        host_evictions=message.host_evictions,
        disk_evictions=message.disk_evictions,
        hits=_by_tier(message.hits),
        loads=_by_tier(message.loads),
        load_seconds=_by_tier(message.load_seconds, _seconds),
    )


def _by_tier(numbers: Mapping[str, N], check: Callable[[N], N] = lambda number: number) -> dict[Tier, N]:
    for name in numbers:
        if name not in _TIERS:
            raise EngineFailed(f"a worker names the unknown tier {name[:40]!r}")
    return {Tier(name): check(number) for name, number in numbers.items()}


def _seconds(number: float) -> float:
    if not (math.isfinite(number) and number >= 0):
        raise EngineFailed("a worker's time for loads isn't a number of seconds")
    return number


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
