"""Between the core dataclasses and their protobuf messages, both directions, field by field.

Owns no meaning: what the values stand for is said in `preft.core.request` and `preft.core.cluster`. Values that don't
fit the message's type (a negative count) raise ValueError in protobuf; the edges check before they come here.
"""

from __future__ import annotations

from dataclasses import asdict, fields

from preft.core.cluster import BY_TIER, AdapterLoad, AdapterPlace, Tier, WorkerLoad
from preft.core.request import NO_BIAS, AdapterRef, FinishReason, Sampling, TokenDelta, TokenLogprob
from preft.rpc import common_pb2, workers_pb2

_FINISH_TO_PROTO = {
    None: common_pb2.FINISH_REASON_UNSPECIFIED,
    FinishReason.STOP: common_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: common_pb2.FINISH_REASON_LENGTH,
}
_FINISH_FROM_PROTO = {value: reason for reason, value in _FINISH_TO_PROTO.items()}


def sampling_to_proto(sampling: Sampling) -> common_pb2.Sampling:
    """The wire form of `sampling`."""
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
    """What `sampling_to_proto` was given."""
    return Sampling(
        max_tokens=message.max_tokens,
        min_tokens=message.min_tokens,
        temperature=message.temperature,
        top_p=message.top_p,
        top_k=message.top_k,
        min_p=message.min_p,
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        repetition_penalty=message.repetition_penalty,
        seed=message.seed if message.HasField("seed") else None,
        ignore_eos=message.ignore_eos,
        eos_token_ids=tuple(message.eos_token_ids),
        stop_token_ids=tuple(message.stop_token_ids),
        logit_bias=dict(message.logit_bias) if message.logit_bias else NO_BIAS,
        logprobs=message.logprobs if message.HasField("logprobs") else None,
    )


def adapter_to_proto(adapter: AdapterRef) -> common_pb2.AdapterRef:
    """The wire form of `adapter`."""
    return common_pb2.AdapterRef(name=adapter.name, digest=adapter.digest, source=adapter.source)


def adapter_from_proto(message: common_pb2.AdapterRef) -> AdapterRef:
    """What `adapter_to_proto` was given."""
    return AdapterRef(name=message.name, digest=message.digest, source=message.source)


def delta_to_proto(delta: TokenDelta) -> common_pb2.TokenDelta:
    """The wire form of `delta`. On the per-token path."""
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
    """What `delta_to_proto` was given. On the per-token path."""
    return TokenDelta(
        message.index,
        tuple(message.token_ids),
        tuple([_logprob_from_proto(logprob) for logprob in message.logprobs]) if message.logprobs else (),
        _FINISH_FROM_PROTO[message.finish_reason] if message.finish_reason else None,
        message.stop_token_id if message.HasField("stop_token_id") else None,
        message.cached_tokens,
    )


def load_to_proto(load: WorkerLoad) -> workers_pb2.StatsReply:
    """A worker's own view of its use, as it answers `Stats`."""
    return workers_pb2.StatsReply(
        running=load.running,
        kv_blocks_total=load.kv_blocks_total,
        kv_blocks_free=load.kv_blocks_free,
        staging_bytes_total=load.staging_bytes_total,
        staging_bytes_used=load.staging_bytes_used,
        open_handles=load.open_handles,
        preemptions=load.preemptions,
        adapters=load.adapters,
        tiers=workers_pb2.AdapterTiers(**asdict(load.tiers)),
    )


def load_from_proto(message: workers_pb2.StatsReply) -> WorkerLoad:
    """What `load_to_proto` was given."""
    return WorkerLoad(
        running=message.running,
        kv_blocks_total=message.kv_blocks_total,
        kv_blocks_free=message.kv_blocks_free,
        staging_bytes_total=message.staging_bytes_total,
        staging_bytes_used=message.staging_bytes_used,
        open_handles=message.open_handles,
        preemptions=message.preemptions,
        adapters=tuple(message.adapters),
        tiers=_tiers_from_proto(message.tiers),
    )


def place_to_proto(place: AdapterPlace) -> workers_pb2.WhereReply:
    """A worker's answer to `Where`."""
    return workers_pb2.WhereReply(tier=place.tier, last_used=place.last_used, users=place.users)


def place_from_proto(worker_id: str, message: workers_pb2.WhereReply) -> AdapterPlace:
    """What `place_to_proto` was given."""
    return AdapterPlace(worker_id, Tier(message.tier), message.last_used, message.users)


def _tiers_from_proto(message: workers_pb2.AdapterTiers) -> AdapterLoad:
    values = {field.name: getattr(message, field.name) for field in fields(AdapterLoad)}
    for name in BY_TIER:
        values[name] = {Tier(tier): value for tier, value in values[name].items()}
    return AdapterLoad(**values)


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
